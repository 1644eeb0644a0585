"""Who peers are and how bytes move: identity, the Transport seam, frames, request/response, invites.

This package never knows what a message means and never sees a tensor.
"""
