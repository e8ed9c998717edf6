"""What a hospital should do about each code: one sentence for whoever looks after the data."""

from __future__ import annotations

REMEDIES = {
    # in quarantine
    "missing": "Put the file back, or take its row out of the table.",
    "outside_root": "Copy the file into the data folder; links that lead out of it are not followed.",
    "no_label": "Add a row for it to the label table, or leave it: it is not used.",
    "label_conflict": "Decide which of its labels is right and correct the table.",
    "no_access": "Give the user that runs consilium the right to read it.",
    "empty": "Export it again: a copy was interrupted.",
    "not_an_image": "Move it out of the folder, or export it as PNG, JPEG, TIFF or DICOM.",
    "no_pixels": "Export it again with its pixel data; some archives send headers alone.",
    "unsupported_syntax": "Ask the PACS for it uncompressed, or as JPEG, JPEG-LS, JPEG 2000 or RLE.",
    "unsupported_image": "Export it as plain grey or RGB; tell us if it is an ordinary clinical image.",
    "too_large": "Leave it out, or export it with fewer frames or pixels.",
    "damaged": "Export it again; if it stays so, the archive's own copy is damaged.",
    "bad_values": "Export it again; its values are not finite or beyond any scanner's range.",
    "timeout": "Export it again or uncompressed; a file that stops a decoder is often damaged.",
    "crashed": "Export it again uncompressed; a file that kills a decoder may be damaged or hostile.",
    "placeholder_patient": "Restore the true PatientID, or name a column that has it with [data] patient.",
    "duplicate_in_other_split": "Nothing, unless the split is your own: then keep an image in one split.",
    # passed over
    "hidden": "Nothing; rename it if it is one of your images.",
    "other_suffix": "Nothing; it is not read.",
    "directory": "Nothing; files are found without their DICOMDIR.",
    "report": "Nothing; only images are used.",
    "key_objects": "Nothing; only images are used.",
    "presentation_state": "Nothing; images are shown by the preset, not by presentation states.",
    "radiotherapy": "Nothing; only images are used.",
    "segmentation": "Nothing; only images are used.",
    "waveform": "Nothing; only images are used.",
    "document": "Nothing; only images are used.",
    "registration": "Nothing; only images are used.",
    "raw_data": "Nothing; only reconstructed images are used.",
    "other_object": "Nothing; tell us if it is an ordinary clinical image.",
    "opted_out": "Nothing; delete the files if your rules ask for it.",
}
"""Code of `client.image.CODES` or `IGNORED` -> what to do."""
