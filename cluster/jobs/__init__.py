"""Jobs for `ray job submit`: work that comes as a file, not over HTTP."""
