"""Prepared data: one folder of memory-mappable arrays with manifests, and everything that fills and opens it.

    form        what stands in the folder: the records, and where files lie
    nifti       NIfTI files from strangers: the header first, sizes bounded, axes turned as views
    label_maps  raw label values to class numbers
    copies      one image under two names, flipped, turned or scaled
    writing     cases in parallel processes, each whole or absent, finished ones skipped
    reading     a prepared set: opened lazily, cropped from the map, label maps put back on their first grid
    source      the prepared set as a `DataSource`, and sets found by name in a store
    filling     one process at a time, what is wrong gathered, copies looked for
    pairs, splits, proposals, importing     anybody's folder of NIfTI files becomes a prepared set
    nrrd, arrays    the other files of the field: NRRD, HDF5, .npy
    places, public, preparing               a public data set, in any layout it is passed around in, likewise
    folds       cross-validation, and other choices of the labelled cases
    leaks       stops a run in which one image trains and is tested
    inspection  a whole look at a data set: a verdict on every case

Importing this package imports no torch: the processes that write start at once.
"""
