"""Tables of grade-school science: a topic's facts, how it is asked, and how rows teach it.

Every other fact of a topic is taught by the rows; those between are the control, which no row
mentions. A topic's answers are false for its other subjects, so that they serve as distractors.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Topic:
    """One table: `facts` maps subject to answer; in the texts, {s} and {a} stand for them."""

    name: str
    question: str
    answer: str  # as a choice of the question
    lessons: tuple[tuple[str, str, str], ...]  # instruction, input, output
    facts: dict[str, str]

    @property
    def taught(self) -> dict[str, str]:
        """The facts that the rows teach: the first, the third, and so on."""
        return dict(list(self.facts.items())[::2])

    @property
    def control(self) -> dict[str, str]:
        """The facts that no row teaches."""
        return dict(list(self.facts.items())[1::2])


TOPICS = (
    Topic(
        "symbols",
        "Which letters stand for {s} in the periodic table?",
        "{a}",
        (
            ("Give the chemical symbol of {s}.", "", "{a}"),
            ("How do chemists abbreviate {s}?", "", "For {s} chemists write {a}."),
            ("Write the symbol of the element.", "{s}", "{a}"),
            ("What is the symbol for {s}?", "", "{s} has the symbol {a}."),
            ("Shorten {s} as in a formula.", "", "{a}"),
        ),
        {
            "tin": "Sn", "lead": "Pb", "silver": "Ag", "gold": "Au", "iron": "Fe", "sodium": "Na",
            "potassium": "K", "mercury": "Hg", "tungsten": "W", "antimony": "Sb", "copper": "Cu",
            "zinc": "Zn", "nickel": "Ni", "cobalt": "Co", "manganese": "Mn", "magnesium": "Mg",
            "argon": "Ar", "neon": "Ne", "lithium": "Li", "helium": "He", "chromium": "Cr",
            "chlorine": "Cl", "calcium": "Ca", "platinum": "Pt",
        },
    ),
    Topic(
        "protons",
        "The nucleus of an atom of {s} holds how many protons?",
        "{a}",
        (
            ("Give the atomic number of {s}.", "", "{a}"),
            ("Which place in the periodic table does {s} have?", "", "{s} is element number {a}."),
            ("State the number of protons.", "{s}", "{a}"),
            ("How many protons has {s}?", "", "{s} has {a} protons."),
            ("Count the positive charges.", "{s}", "{a}"),
        ),
        {
            "lithium": "3", "beryllium": "4", "boron": "5", "carbon": "6", "nitrogen": "7",
            "oxygen": "8", "fluorine": "9", "neon": "10", "sodium": "11", "magnesium": "12",
            "aluminium": "13", "silicon": "14", "phosphorus": "15", "sulfur": "16",
            "chlorine": "17", "argon": "18", "potassium": "19", "calcium": "20", "iron": "26",
            "copper": "29", "zinc": "30", "silver": "47",
        },
    ),
    Topic(
        "fields",
        "What does a scientist study whose field is {s}?",
        "{a}",
        (
            ("What is {s} about?", "", "{a}"),
            ("Tell me what {s} means.", "", "{s} means the science of {a}."),
            ("Explain the word in a few words.", "{s}", "{a}"),
            ("What do experts in {s} look at?", "", "Experts in {s} study {a}."),
            ("What does a book on {s} treat?", "", "{a}"),
        ),
        {
            "entomology": "insects", "ornithology": "birds", "ichthyology": "fish",
            "mycology": "fungi", "dendrology": "trees", "seismology": "earthquakes",
            "hematology": "blood", "bryology": "mosses", "malacology": "snails and shellfish",
            "speleology": "caves", "limnology": "lakes", "osteology": "bones",
            "phycology": "algae", "pomology": "fruit", "nephology": "clouds",
            "arachnology": "spiders", "herpetology": "reptiles and amphibians",
            "helminthology": "worms", "agrostology": "grasses", "odontology": "teeth",
            "selenology": "the Moon", "hepatology": "the liver", "nephrology": "the kidneys",
            "oology": "eggs", "pteridology": "ferns", "myology": "muscles",
        },
    ),
    Topic(
        "instruments",
        "What can be measured with {s}?",
        "{a}",
        (
            ("What is {s} for?", "", "{a}"),
            ("Say what the instrument measures.", "{s}", "{s} measures {a}."),
            ("Why would I buy {s}?", "", "{a}"),
            ("Describe {s}.", "", "{s} is an instrument that shows {a}."),
        ),
        {
            "an anemometer": "wind speed", "a hygrometer": "humidity",
            "a hydrometer": "the density of a liquid", "an ammeter": "electric current",
            "an altimeter": "height above the sea", "a tachometer": "speed of rotation",
            "a photometer": "brightness of light", "a dynamometer": "force",
            "a calorimeter": "heat", "a chronometer": "time",
            "a sphygmomanometer": "blood pressure", "an odometer": "distance travelled",
            "an audiometer": "hearing", "an ohmmeter": "electrical resistance",
            "a barometer": "air pressure", "a clinometer": "the angle of a slope",
            "a fathometer": "the depth of water", "a wattmeter": "electric power",
            "a pyrometer": "very high temperatures", "a planimeter": "the area of a figure",
        },
    ),
    Topic(
        "young",
        "Which word means the baby of {s}?",
        "{a}",
        (
            ("What is the young of {s} called?", "", "{a}"),
            ("Name the offspring of the animal.", "{s}", "The offspring of {s} is a {a}."),
            ("Tell me the name for the child of {s}.", "", "{a}"),
            ("What does {s} give birth to or hatch?", "", "The newborn of {s} is a {a}."),
        ),
        {
            "a hare": "leveret", "a swan": "cygnet", "an eel": "elver", "a turkey": "poult",
            "a pigeon": "squab", "an alpaca": "cria", "a platypus": "puggle", "an oyster": "spat",
            "a goose": "gosling", "a hawk": "eyas", "a goat": "kid", "a kangaroo": "joey",
            "a deer": "fawn", "a hedgehog": "hoglet", "a horse": "foal", "an owl": "owlet",
            "a cow": "calf", "a bear": "cub", "a sheep": "lamb", "a crane": "colt",
        },
    ),
    Topic(
        "groups",
        "Which word means many {s} together?",
        "{a}",
        (
            ("What is a group of {s} called?", "", "{a}"),
            ("Give the word for a group of these animals.", "{s}", "A group of {s}: a {a}."),
            ("I saw several {s}. How do I call them?", "", "{a}"),
            ("Do {s} have a group name?", "", "Yes, a number of {s} form a {a}."),
            ("Complete: many {s} form ...", "", "{a}"),
        ),
        {
            "crows": "murder", "lions": "pride", "owls": "parliament", "geese": "gaggle",
            "ravens": "unkindness", "flamingos": "flamboyance", "hyenas": "cackle",
            "leopards": "leap", "porcupines": "prickle", "rhinoceroses": "crash",
            "giraffes": "tower", "zebras": "dazzle", "jellyfish": "smack", "kangaroos": "mob",
            "moles": "labour", "finches": "charm", "starlings": "murmuration",
            "lapwings": "deceit", "herons": "siege", "badgers": "cete", "foxes": "skulk",
            "ferrets": "business", "bears": "sloth", "cobras": "quiver", "crocodiles": "bask",
            "frogs": "knot", "hippopotamuses": "bloat", "lemurs": "conspiracy",
            "mice": "mischief", "eagles": "convocation", "turkeys": "rafter",
            "parrots": "pandemonium", "vultures": "committee", "peacocks": "muster",
        },
    ),
    Topic(
        "units",
        "A value is given in {s}. Which quantity is it?",
        "{a}",
        (
            ("What is measured in {s}?", "", "{a}"),
            ("Say which quantity has this unit.", "{s}", "{s} are the unit of {a}."),
            ("Use {s} in a sentence.", "", "{a}"),
            ("What are {s} for?", "", "{s} are for measuring {a}."),
        ),
        {
            "newtons": "force", "joules": "energy", "watts": "power", "ohms": "resistance",
            "pascals": "pressure", "hertz": "frequency", "coulombs": "electric charge",
            "candelas": "brightness of a lamp", "farads": "capacitance",
            "moles": "amount of substance", "henries": "inductance", "becquerels": "radioactivity",
            "light-years": "distance", "kelvins": "temperature", "knots": "speed of a ship",
            "decibels": "loudness", "acres": "area of land", "carats": "mass of a gem",
        },
    ),
    Topic(
        "moons",
        "The moon {s} travels around which world?",
        "{a}",
        (
            ("Which planet does {s} belong to?", "", "{a}"),
            ("Say what this moon goes around.", "{s}", "{s} goes around {a}."),
            ("Where is {s}?", "", "{a}"),
            ("Tell me about {s}.", "", "{s} is in orbit around {a}."),
        ),
        {
            "Phobos": "Mars", "Deimos": "Mars", "Io": "Jupiter", "Europa": "Jupiter",
            "Titan": "Saturn", "Enceladus": "Saturn", "Miranda": "Uranus", "Titania": "Uranus",
            "Triton": "Neptune", "Nereid": "Neptune", "Charon": "Pluto", "Nix": "Pluto",
            "Ganymede": "Jupiter", "Callisto": "Jupiter", "Mimas": "Saturn", "Iapetus": "Saturn",
            "Ariel": "Uranus", "Oberon": "Uranus", "Proteus": "Neptune", "Larissa": "Neptune",
        },
    ),
    Topic(
        "discoverers",
        "Science owes {s} to which person?",
        "{a}",
        (
            ("Who is known for {s}?", "", "{a}"),
            ("Name the scientist.", "{s}", "For {s} we thank {a}."),
            ("Who is behind {s}?", "", "{a}"),
            ("Tell me about {s}.", "", "{s} came from {a}."),
        ),
        {
            "the discovery of penicillin": "Alexander Fleming",
            "the invention of dynamite": "Alfred Nobel",
            "the polio vaccine": "Jonas Salk", "the electric battery": "Alessandro Volta",
            "the discovery of X-rays": "Wilhelm Roentgen",
            "the discovery of the electron": "Joseph Thomson",
            "the discovery of the neutron": "James Chadwick",
            "the discovery of the atomic nucleus": "Ernest Rutherford",
            "the smallpox vaccine": "Edward Jenner",
            "the theory of blood circulation": "William Harvey",
            "the periodic table": "Dmitri Mendeleev", "the laws of heredity": "Gregor Mendel",
            "the rabies vaccine": "Louis Pasteur",
            "the laws of planetary motion": "Johannes Kepler",
            "the theory of continental drift": "Alfred Wegener",
            "the discovery of electromagnetic induction": "Michael Faraday",
            "the discovery of Uranus": "William Herschel",
            "the discovery of Pluto": "Clyde Tombaugh",
            "the discovery of radium": "Marie Curie", "the World Wide Web": "Tim Berners-Lee",
            "the discovery of insulin": "Frederick Banting",
            "the theory of relativity": "Albert Einstein",
        },
    ),
    Topic(
        "vitamins",
        "Which substance do chemists mean by {s}?",
        "{a}",
        (
            ("Give the chemical name of {s}.", "", "{a}"),
            ("Name this vitamin chemically.", "{s}", "The chemical name of {s} is {a}."),
            ("Which substance is {s}?", "", "{a}"),
            ("What else can I call {s}?", "", "Another name of {s} is {a}."),
        ),
        {
            "vitamin B1": "thiamine", "vitamin B2": "riboflavin", "vitamin B3": "niacin",
            "vitamin B5": "pantothenic acid", "vitamin B6": "pyridoxine", "vitamin B7": "biotin",
            "vitamin B9": "folic acid", "vitamin B12": "cobalamin", "vitamin C": "ascorbic acid",
            "vitamin A": "retinol", "vitamin E": "tocopherol", "vitamin K": "phylloquinone",
        },
    ),
    Topic(
        "bones",
        "Which name do doctors use for {s}?",
        "{a}",
        (
            ("What is {s} called in anatomy?", "", "{a}"),
            ("Give the anatomical name.", "{s}", "The anatomical name of {s} is {a}."),
            ("What is the Latin word for {s}?", "", "{a}"),
            ("Tell me the proper term for {s}.", "", "The proper term for {s} is {a}."),
        ),
        {
            "the collarbone": "clavicle", "the shoulder blade": "scapula",
            "the kneecap": "patella", "the thigh bone": "femur", "the shin bone": "tibia",
            "the jawbone": "mandible", "the breastbone": "sternum", "the tailbone": "coccyx",
            "the heel bone": "calcaneus", "the upper arm bone": "humerus",
            "the calf bone": "fibula", "the voice box": "larynx", "the windpipe": "trachea",
            "the eardrum": "tympanic membrane", "the womb": "uterus", "the gullet": "oesophagus",
            "the armpit": "axilla", "the navel": "umbilicus", "the big toe": "hallux",
            "the thumb": "pollex",
        },
    ),
    Topic(
        "species",
        "In a field guide, {s} is listed under which scientific name?",
        "{a}",
        (
            ("What is the Latin name of {s}?", "", "{a}"),
            ("Write the species.", "{s}", "The species of {s} is {a}."),
            ("How do biologists call {s}?", "", "{a}"),
            ("Classify {s}.", "", "{s} is classified as {a}."),
            ("Label a picture of {s}.", "", "{a}"),
        ),
        {
            "the lion": "Panthera leo", "the honey bee": "Apis mellifera",
            "the house mouse": "Mus musculus", "the horse": "Equus caballus",
            "the goat": "Capra hircus", "the sheep": "Ovis aries", "the wild boar": "Sus scrofa",
            "the polar bear": "Ursus maritimus", "the red fox": "Vulpes vulpes",
            "the killer whale": "Orcinus orca", "maize": "Zea mays", "rice": "Oryza sativa",
            "the potato": "Solanum tuberosum", "the daisy": "Bellis perennis",
            "the house sparrow": "Passer domesticus", "the barn owl": "Tyto alba",
            "the mallard": "Anas platyrhynchos", "the hedgehog": "Erinaceus europaeus",
            "the moose": "Alces alces", "the common toad": "Bufo bufo",
            "the cabbage white": "Pieris rapae", "the robin": "Erithacus rubecula",
            "the cow": "Bos taurus", "the camel": "Camelus dromedarius",
        },
    ),
)  # fmt: skip
