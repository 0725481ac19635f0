"""The door: parse, call one function, show."""
