"""TODO sweeping"""
