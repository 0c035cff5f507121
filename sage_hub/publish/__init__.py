"""Where a release goes: a folder that appears when it is whole, or one commit to the Hub."""
