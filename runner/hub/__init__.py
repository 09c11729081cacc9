"""Models from a hub: what a repository holds, fetching files, and what is on this machine."""
