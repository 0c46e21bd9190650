"""What the verbs beside ``compress`` do, a file each: parse nothing, print nothing, compose acts and folders.

=====================  ===========================================
``blocks``             ``layerwise depth``
``reshape``            ``layerwise reshape``
``distilling``         ``layerwise tune`` (its checks: ``distilling_prepare``)
``searching``          ``layerwise search``
``training``           ``layerwise train``
``generating``         ``layerwise generate``
``fitting``            ``layerwise fit``
``exporting``          ``layerwise export`` (what rounding for an engine loses: ``rounding_loss``)
``importing``          ``layerwise import``
``cache_quality``      ``layerwise evaluate --kv-cache``
``bench``              ``layerwise bench``
``side_by_side``       ``layerwise compare``
=====================  ===========================================
"""
