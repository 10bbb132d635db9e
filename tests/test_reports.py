"""Reports: sections under headers of many kinds, sentences between abbreviations and lists."""

from __future__ import annotations

import random

import pytest

from pipelines.reports import ReportSections, report_sections
from pipelines.sentences import report_sentences, split_sentences

USUAL = """                                 FINAL REPORT
 EXAMINATION:  CHEST (PA AND LAT)

 INDICATION:  ___F with cough  // pneumonia?

 COMPARISON:  ___

 FINDINGS:

 There is no focal consolidation.
 LUNGS: clear.

 The bones are intact.

 IMPRESSION:

 No acute process.

 NOTIFICATION:  Dr. ___ was told at 9:05 a.m.
"""

NO_HEADERS = """ FINAL REPORT
 CHEST RADIOGRAPH

 INDICATION: Cough.

 COMPARISON: None.

 There is a small effusion.
 The heart is large.

 No pneumothorax.
"""

WET_READ = """ WET READ: ___ ___ 9:05 AM
  No effusion in this first look.
 ______________________________________________________________________________
 FINAL REPORT
 PORTABLE AP VIEW OF THE CHEST:  The lungs are clear.

 IMPRESSION:  Normal.

 ADDENDUM:  Discussed by telephone.
"""

ONE_LINE = (
    "FINAL REPORT EXAMINATION: CHEST (PORTABLE AP) INDICATION: ___ year old woman COMPARISON: Chest "
    "radiographs ___ IMPRESSION: Mild edema. Heart size normal. END OF IMPRESSION: SUMMARY 2: ABNORMAL"
)


def words(text: str) -> str:
    return " ".join(text.split())


@pytest.mark.parametrize(
    ("report", "findings", "impression"),
    [
        (
            USUAL,
            "There is no focal consolidation. LUNGS: clear. The bones are intact.",
            "No acute process.",
        ),
        (
            USUAL.upper(),
            "THERE IS NO FOCAL CONSOLIDATION. LUNGS: CLEAR. THE BONES ARE INTACT.",
            "NO ACUTE PROCESS.",
        ),
        (
            USUAL.replace("\n", "\r\n"),
            "There is no focal consolidation. LUNGS: clear. The bones are intact.",
            "No acute process.",
        ),
        (NO_HEADERS, "There is a small effusion. The heart is large. No pneumothorax.", ""),
        (WET_READ, "The lungs are clear.", "Normal."),
        (ONE_LINE, "", "Mild edema. Heart size normal."),
        ("Findings: Clear lungs.\nConclusion: Normal chest.", "Clear lungs.", "Normal chest."),
        ("Findings\nClear lungs.\n\nOpinion\nNormal chest.", "Clear lungs.", "Normal chest."),
        (
            "FINDINGS (CHEST): Clear lungs.\nIMPRESSION (final):\nNormal chest.",
            "Clear lungs.",
            "Normal chest.",
        ),
        ("FINDINGS AND IMPRESSION:  Clear lungs.", "Clear lungs.", "Clear lungs."),
        ("IMPRESSION/FINDINGS:  Clear lungs.\n\nRECOMMENDATION(S): CT.", "Clear lungs.", "Clear lungs."),
        ("IMPRESSION: One.\nFINDINGS: Two.\nIMPRESSION: Three.", "Two.", "One. Three."),
        ("FINDINGS:\nIMPRESSION:\n", "", ""),
        ("IMPRESSION:", "", ""),
        ("COMPARISON: None.\nThe lungs are clear.", "", ""),
        (
            "The lungs are clear. There are no other\nfindings\nof note.",
            "The lungs are clear. There are no other findings of note.",
            "",
        ),
        ("", "", ""),
        (" \n\n ", "", ""),
    ],
)
def test_sections_are_found_under_their_headers(report, findings, impression):
    found = report_sections(report)
    assert words(found.text("findings")) == findings
    assert words(found.text("impression")) == impression


def test_both_sections_are_never_said_twice():
    assert words(report_sections(USUAL).text("both")).endswith("intact. No acute process.")
    assert report_sections("FINDINGS AND IMPRESSION: Clear.").text("both") == "Clear."
    assert words(report_sections(NO_HEADERS).text("both")).startswith("There is a small effusion.")
    assert report_sections("IMPRESSION: Normal.").text("findings") == ""
    assert ReportSections(body="x").text("impression") == ""


def test_what_is_said_beside_the_report_is_left_out():
    text = " ".join(report_sections(report).text("both") for report in (USUAL, WET_READ, ONE_LINE))
    for aside in ("told", "first look", "telephone", "SUMMARY", "FINAL", "cough", "___ year"):
        assert aside not in text


def test_a_view_is_a_header_only_where_there_are_no_findings():
    report = "FINDINGS: Two devices.\nCHEST, SINGLE VIEW: Clear lungs.\nIMPRESSION: Normal."
    assert words(report_sections(report).findings) == "Two devices. CHEST, SINGLE VIEW: Clear lungs."
    report = "IMPRESSION: Normal.\nCHEST VIEW: Clear lungs."
    assert words(report_sections(report).impression) == "Normal. CHEST VIEW: Clear lungs."


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        (
            "Compared with the exam by Dr. Smith at 5:15 p.m. on ___. IMPRESSION holds. No change.",
            ["Compared with the exam by Dr. Smith at 5:15 p.m. on ___.", "IMPRESSION holds.", "No change."],
        ),
        (
            "A 1.5 cm nodule in the R. upper lobe, e.g. a granuloma. The tip ends 3.5 cm. above the carina.",
            [
                "A 1.5 cm nodule in the R. upper lobe, e.g. a granuloma.",
                "The tip ends 3.5 cm. above the carina.",
            ],
        ),
        (
            "Told to Dr. J. Smith at 9 a.m. Dr. ___ agreed. ___ was called.",
            ["Told to Dr. J. Smith at 9 a.m.", "Dr. ___ agreed.", "___ was called."],
        ),
        (
            "AP CHEST 5:15 P.M. ON ___ IS SEEN. NO EFFUSION.",
            ["AP CHEST 5:15 P.M. ON ___ IS SEEN.", "NO EFFUSION."],
        ),
        ("Effusion: no. Edema: no. See No. 3 there.", ["Effusion: no.", "Edema: no.", "See No. 3 there."]),
        (
            "Known hepatitis C. Liver at T12. Lungs vs. Bones.",
            ["Known hepatitis C.", "Liver at T12.", "Lungs vs. Bones."],
        ),
        (
            "1. No process.\n2. Nodule of 2. 5 cm\n3. Stable",
            ["1. No process.", "2. Nodule of 2. 5 cm", "3. Stable"],
        ),
        ("Seen: 1. Low volumes 2. No effusion", ["Seen:", "1. Low volumes", "2. No effusion"]),
        ("It measures 2. No effusion.", ["It measures 2.", "No effusion."]),
        (
            "- one thing\n- Another that\n  goes on\n\nNo stop\n\nEnd",
            ["- one thing", "- Another that goes on", "No stop", "End"],
        ),
        (
            "Is there edema? Yes! (See above.) Then more.",
            ["Is there edema?", "Yes!", "(See above.)", "Then more."],
        ),
        ("the lungs\nare clear", ["the lungs are clear"]),
        ("", []),
        (" \n ", []),
    ],
)
def test_sentences_end_where_they_should(text, sentences):
    assert split_sentences(text) == sentences


def test_short_sentences_and_list_marks_go():
    text = "1. No acute process.\n2. Stable.\n3. ___ ___ Dr. ___.\n- 1. Heart is large."
    assert report_sentences(text) == ["No acute process.", "Heart is large."]
    assert report_sentences(text, min_tokens=1)[1] == "Stable."
    assert report_sentences("") == []


PIECES = (
    "1. 2. 3) (1) - • a) Dr. J. C. p.m. P.M. ___ ___. lungs Clear. No no. effusion. cm. 1.5 2 e.g. R. is: "
    "IMPRESSION ok! ? (see above.) Why? No. 5."
)


def test_any_text_keeps_its_words_and_is_divided_once():
    generator = random.Random(0)
    for _ in range(3000):
        pieces = generator.choices([*PIECES.split(), "\n", "\n\n"], k=generator.randint(0, 14))
        text = " ".join(pieces)
        sentences = split_sentences(text)
        assert " ".join(sentences).split() == text.split()
        assert all(split_sentences(sentence) == [sentence] for sentence in sentences)
        assert split_sentences("\n\n".join(sentences)) == sentences
        kept = report_sentences(text)
        assert report_sentences("\n\n".join(kept)) == kept


def test_sections_hold_words_of_the_report_in_order():
    generator = random.Random(1)
    headers = (
        "FINDINGS:",
        "IMPRESSION:",
        "Findings",
        "INDICATION:",
        "ADDENDUM:",
        "_____",
        "CHEST VIEW:",
        "FINAL REPORT",
    )
    for _ in range(500):
        lines = generator.choices([*headers, "The lungs are clear.", "Heart", ""], k=generator.randint(0, 12))
        found = report_sections("\n".join(lines))
        rest = iter("\n".join(lines).split())
        # As a subsequence: nothing is made up, doubled or moved.
        assert all(word in rest for word in found.findings.split())
        assert not (found.body and (found.findings or found.impression or found.mixed))
        assert "FINDINGS" not in found.impression
