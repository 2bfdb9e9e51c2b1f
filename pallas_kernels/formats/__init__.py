"""The packed number formats of weights."""
