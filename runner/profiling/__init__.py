"""The parts of `buddyrun profile`: which tokens, what the experts make of them, what that says."""
