"""The channels a single input is routed through (CDRP), and what they tell."""
