"""Differential testing of speech to text: DFlare and a genetic search on audio (section 6.1)."""
