"""The coordinator: rounds, admission, aggregation, state and report; it never sees an image."""
