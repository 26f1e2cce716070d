"""Runtime fixes of upstream faults, one module each.

A module names the package and the versions that have the fault, the reason with a link, and has
`is_needed()` and `apply()`, which returns what takes the fix back. Nothing here runs unless a
poison or a monitor is selected; a test fails when upstream has healed.
"""
