"""Watches an optimizer while it trains: `Monitor`, its samples, alerts, writers and report."""
