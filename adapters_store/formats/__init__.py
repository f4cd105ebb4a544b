"""One importer (and exporter) per adapter file format."""
