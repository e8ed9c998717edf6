"""What `consilium site check` shows: on the terminal, as JSON, and as one HTML file."""
