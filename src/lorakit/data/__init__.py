"""Data: from a name the user wrote to batches of tensors. Read in this order:

source (row split jsonl textfile hub)   a name -> rows, train or validation side
builtin (docstrings), constructed       real data without a network; tasks whose truth is known
encoded, chat, tokenize                 rows -> token ids and labels
pack (packable), pad, sampler           samples -> windows -> batches, in a resumable order
tiny                                    config-made models and a tokenizer for tests
"""
