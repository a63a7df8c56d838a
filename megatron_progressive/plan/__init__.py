"""Before a run: preflight, the plan, layouts that fit, and the bytes that move at τ."""
