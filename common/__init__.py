"""What both sides of a federation speak: configuration, model, parameters, messages, metrics."""
