"""The page in the browser: mark objects, follow them through a video, correct, and export.

:func:`vosops.studio.launch.serve` runs it; nothing else of the package imports this room. The server needs
``pip install 'vosops[studio]'``.
"""
