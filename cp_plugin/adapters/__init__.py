"""Frameworks behind the protocol of `cp_plugin.host`."""
