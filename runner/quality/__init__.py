"""How far one run's answers are from another's, as numbers and as text. Knows no engine."""
