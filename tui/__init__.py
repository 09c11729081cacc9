"""The Textual interface. Talks to `runner.client` only."""
