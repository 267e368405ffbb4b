"""TODO families"""
