"""TODO objectives"""
