"""Dashboards for Grafana, and a picture of them."""
