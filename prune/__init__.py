"""Networks with fewer synapses: which go by which criterion, what goes with them, what is left.

`criteria` scores synapses, `masks` keeps the top share of them, `removal` finds the neurons that go
with their synapses, `compact` makes a smaller network of it, `protect` hides the most valuable ones
from an attacker.
"""
