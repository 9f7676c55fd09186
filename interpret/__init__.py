"""The channels a single input is routed through (CDRP), what they tell, and detection by them."""
