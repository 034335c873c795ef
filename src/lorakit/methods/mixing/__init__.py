"""Survey 4.2: mixture with learned weights."""
