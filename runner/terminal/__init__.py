"""Everything a person sees and types in a plain terminal. Knows no engine, only the client."""
