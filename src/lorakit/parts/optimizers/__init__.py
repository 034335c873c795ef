"""Update rules, as values."""
