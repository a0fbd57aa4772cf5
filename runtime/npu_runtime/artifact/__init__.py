"""The artifact: a folder with a manifest, programs, weights and a reference.

`schema` says what a manifest holds, `codec` turns it into JSON and back, `store` opens folders and
checks their files, `staging` puts whole folders in place.
"""
