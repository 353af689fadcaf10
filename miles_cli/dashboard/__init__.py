"""`miles watch` as a full-screen dashboard. Everything it shows comes from run directories alone.

Painters are pure functions from a snapshot and a size to styled text; Textual only places them and listens.
"""
