"""Data: from a name the user wrote to batches of tensors. Read in this order:

row, records, recognize, lazy           what a row is; what a file holds; columns of known formats -> rows, made when asked for
source (jsonl tables textfile folder    a name -> rows, train and validation side
        hub split mixture)
builtin (docstrings), constructed       real data without a network; tasks whose truth is known
encoded, chat                           texts and conversations -> token ids and labels
tokenized (parallel token_cache)        what all shapes of rows share: a few at a time, counted, in processes, cached
tokenize, preference, tag               the shapes
pack (packable), pad, sampler           samples -> windows -> batches, in a resumable order
tiny                                    config-made models and a tokenizer for tests
"""
