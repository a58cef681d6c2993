"""Readers of public benchmarks: files a user has, turned into arrays and architectures."""
