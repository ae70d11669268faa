"""Results as data, tables, images and pages."""
