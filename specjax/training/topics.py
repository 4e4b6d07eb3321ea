"""What the prompt templates speak of: plain lists of words and phrases, written for this project.

Nothing here comes from a data set, and nothing from prompts that acceptance is measured on.
"""

__all__ = [
    "ASPECTS",
    "CODE_CONDITIONS",
    "CODE_ITEMS",
    "CODE_RESULTS",
    "CODE_TASKS",
    "EDITS",
    "GOODS",
    "LANGUAGES",
    "NAMES",
    "OPENINGS",
    "PLACES",
    "PROFESSIONS",
    "SENTENCES",
    "TOPICS",
]


def _phrases(text: str) -> tuple[str, ...]:
    return tuple(" ".join(text.split()).strip(" ;").split("; "))


TOPICS = _phrases(
    """
    the water cycle; black holes; the French Revolution; sourdough bread; electric cars; coral
    reefs; the immune system; chess openings; jazz music; solar power; the Roman Empire;
    volcanoes; honey bees; machine learning; the stock market; yoga; the human heart; container
    gardening; the Silk Road; coffee; earthquakes; vaccines; the moon landing; impressionist
    painting; wind turbines; sleep; recycling; the printing press; penguins; inflation;
    photography; the Great Wall of China; antibiotics; tea; bicycles; the periodic table;
    dinosaurs; public libraries; meditation; deserts; the violin; rivers; supply and demand; the
    Olympic Games; DNA; bread making; glaciers; the internet; dreams; whales; renewable energy;
    time management; the Industrial Revolution; hiking; Shakespeare; batteries; memory; urban
    planning; the Amazon rainforest; robots; budgeting; ballet; the solar system; migration; soap;
    climate change; football tactics; the nervous system; castles; trains; chocolate; job
    interviews; ancient Egypt; gravity; wolves; remote work; the Renaissance; databases;
    lighthouses; nutrition; tides; small businesses; the Vikings; public speaking; thunderstorms;
    democracy; cats; bridges; quantum computers; gardening in winter; the violin family; lakes;
    cryptography; marathon running; the Cold War; pottery; elephants; mountain weather; online
    shopping; parenting; folk tales; owls; interest rates; photosynthesis; the telephone; ocean
    currents; strength training; insects; maps; the Great Depression; pianos; air travel; habits;
    languages; forest fires; the Magna Carta; spices; compilers; sailing; astronomy for beginners;
    first aid; the steam engine; museums; friendship; rice; operating systems; the Ottoman Empire;
    butterflies; water purification; stress; mathematics; horses;
    """
)

ASPECTS = _phrases(
    """
    the history of; the main ideas behind; common mistakes about; the benefits of; the problems
    with; a beginner's guide to; the science of; surprising facts about; the future of; how people
    learn about; the economics of; why people care about; the most important things to know about;
    a short story about; the advantages and disadvantages of; the cultural importance of; three
    questions about
    """
)

PROFESSIONS = _phrases(
    """
    teacher; nurse; software engineer; chef; travel guide; historian; journalist; lawyer; farmer;
    pilot; architect; biologist; detective; librarian; carpenter; musician; mechanic; economist;
    poet; coach
    """
)

NAMES = _phrases(
    """
    Anna; Ben; Clara; David; Elena; Farid; Grace; Hugo; Ines; Jonas; Kira; Liam; Maya; Noah; Olga;
    Pedro; Rosa; Sam; Tara; Victor; Wendy; Yusuf; Zoe; Amir; Lucy; Oscar
    """
)

PLACES = _phrases(
    """
    Paris; Cairo; Brazil; Japan; Norway; the Alps; Kenya; Canada; Istanbul; New Zealand; Mexico
    City; the Mediterranean; India; Scotland; Peru; Vienna; Morocco; Chicago; Iceland; Sydney;
    Vietnam; Rome; South Africa; the Rocky Mountains; Berlin; Argentina; Seoul; Portugal; Alaska;
    Prague
    """
)

GOODS = _phrases(
    """
    apples; books; pencils; tickets; cookies; marbles; shirts; chairs; stamps; bottles; flowers;
    toys; eggs; cards; lamps; bricks; candles; sandwiches; plants; notebooks; coins; oranges;
    balls; cakes
    """
)

# (what the function takes, its name in code, its annotation, an example value)
CODE_ITEMS = (
    ("a list of integers", "numbers", "List[int]", "[3, 1, 4, 1, 5]"),
    ("a list of strings", "words", "List[str]", "['apple', 'kiwi', 'fig']"),
    ("a string", "text", "str", "'hello world'"),
    ("a positive integer", "n", "int", "12"),
    ("a list of floats", "values", "List[float]", "[1.5, 2.0, -3.25]"),
    ("a dictionary of strings to integers", "counts", "Dict[str, int]", "{'a': 3, 'b': 1}"),
    ("a list of pairs of integers", "pairs", "List[Tuple[int, int]]", "[(1, 2), (3, 4)]"),
    ("a matrix given as a list of rows", "matrix", "List[List[int]]", "[[1, 2], [3, 4]]"),
)

# (what it returns, the end of its name, its annotation)
CODE_RESULTS = {
    "List[int]": (
        ("the sum of the {} elements", "sum", "int"),
        ("the largest of the {} elements, or None if there is none", "largest", "Optional[int]"),
        ("the {} elements in ascending order", "sorted", "List[int]"),
        ("how many {} elements there are", "count", "int"),
        ("the list without its {} elements", "without", "List[int]"),
        ("the positions of the {} elements", "positions", "List[int]"),
        ("the product of the {} elements", "product", "int"),
        ("the running total of the {} elements", "running_total", "List[int]"),
        ("whether every element is {}", "all", "bool"),
    ),
    "List[str]": (
        ("the longest of the {} words", "longest", "Optional[str]"),
        ("the {} words joined by commas", "joined", "str"),
        ("the number of {} words", "count", "int"),
        ("the {} words in alphabetical order", "sorted", "List[str]"),
        ("a dictionary from each of the {} words to its length", "lengths", "Dict[str, int]"),
        ("the {} words in upper case", "upper", "List[str]"),
    ),
    "str": (
        ("the number of {} characters", "count", "int"),
        ("the string without its {} characters", "without", "str"),
        ("the string with its {} characters reversed in place", "reversed", "str"),
        ("whether the {} characters form a palindrome", "palindrome", "bool"),
        ("a dictionary that counts the {} characters", "histogram", "Dict[str, int]"),
        ("the first of the {} characters, or an empty string", "first", "str"),
    ),
    "int": (
        ("the sum of the {} numbers from 1 to n", "sum", "int"),
        ("a list of the {} numbers up to n", "list", "List[int]"),
        ("whether n is {}", "check", "bool"),
        ("the n-th of the {} numbers", "nth", "int"),
        ("how many divisors of n are {}", "divisors", "int"),
    ),
    "List[float]": (
        ("the mean of the {} values", "mean", "float"),
        ("the {} values scaled to lie between 0 and 1", "scaled", "List[float]"),
        ("the difference between the largest and the smallest {} value", "spread", "float"),
        ("the {} values rounded to one decimal", "rounded", "List[float]"),
    ),
    "Dict[str, int]": (
        ("the key with the largest {} value", "best", "Optional[str]"),
        ("a new dictionary with only the {} values", "filter", "Dict[str, int]"),
        ("the sum of the {} values", "total", "int"),
        ("the keys of the {} values, sorted", "keys", "List[str]"),
    ),
    "List[Tuple[int, int]]": (
        ("the sums of the {} pairs", "sums", "List[int]"),
        ("the {} pairs with their members swapped", "swapped", "List[Tuple[int, int]]"),
        ("the number of {} pairs", "count", "int"),
    ),
    "List[List[int]]": (
        ("the sum of the {} entries", "sum", "int"),
        ("the number of {} entries in each row", "per_row", "List[int]"),
        ("the transpose, with 0 in place of the {} entries", "transpose", "List[List[int]]"),
    ),
}

# By the annotation of what is taken; every condition is an adjective for "elements".
CODE_CONDITIONS = {
    "List[int]": ("even", "odd", "positive", "negative", "prime", "distinct", "non-zero"),
    "List[str]": ("non-empty", "lower-case", "palindromic", "repeated", "short", "numeric"),
    "str": ("vowel", "upper-case", "alphabetic", "repeated", "digit", "consonant", "non-blank"),
    "int": ("even", "odd", "prime", "perfect", "triangular", "square", "Fibonacci", "happy"),
    "List[float]": ("positive", "negative", "finite", "distinct", "non-zero"),
    "Dict[str, int]": ("positive", "even", "odd", "negative", "non-zero"),
    "List[Tuple[int, int]]": ("increasing", "equal", "decreasing", "distinct"),
    "List[List[int]]": ("even", "odd", "positive", "negative", "diagonal", "non-zero"),
}

CODE_TASKS = _phrases(
    """
    reads a CSV file and prints the average of each column; sorts a list with quicksort; checks
    whether a string is a palindrome; implements a stack with push and pop; counts the words in a
    text file; finds the shortest path in a grid; converts temperatures between Celsius and
    Fahrenheit; prints the first n prime numbers; merges two sorted lists; implements binary
    search; reverses a linked list; computes the factorial of a number with recursion; removes
    duplicates from a list; validates an email address with a regular expression; simulates
    rolling two dice; builds a to-do list in the terminal; parses a JSON file and prints its keys;
    draws a multiplication table; finds the most common word; implements a queue with two stacks;
    computes the Fibonacci sequence with memoization; counts vowels; flattens a nested list;
    checks whether brackets are balanced; rotates a matrix by ninety degrees; caches the results
    of a function; writes a simple HTTP server; encrypts a text with a Caesar cipher; groups words
    that are anagrams of each other; computes the greatest common divisor; defines a class for a
    bank account; defines a class for a rectangle with area and perimeter; downloads a web page;
    finds the two numbers in a list that add up to a target; prints a calendar month; sums the
    digits
    """
)

EDITS = _phrases(
    """
    Correct the spelling and grammar of this text; Rewrite this text in simpler words; Make this
    text more formal; Repeat this text exactly; Rewrite this text in the past tense; Turn this
    text into a list of bullet points; Shorten this text to two sentences; Rewrite this text for a
    child; Replace every name in this text by another one; Improve the style of this text; Rewrite
    this text as an email; Rewrite the following in the first person; Put a title above this text
    and repeat it; Continue this text
    """
)

# How a user begins to speak, where the target itself writes the rest.
OPENINGS = {
    "any": (
        "",
        "",
        "",
        "I",
        "Can you",
        "Please",
        "My",
        "Help me",
        "Given",
        "In this task",
        "You are",
    ),
    "code": (
        "Finish this Python function:\n\n```python\ndef",
        "Fill in the body of the function.\n\n```python\nfrom typing import",
        "Complete this code:\n\n```python\nclass",
        "Write a Python function",
        "Write a Python function called",
        "Write a Python program that",
        "Implement a function",
        "Implement a class",
        "Fix the bug in this code:\n\n```python\ndef",
        "Explain what this code does:\n\n```python\nimport",
        "def",
        "Write a SQL query",
        "Write a JavaScript function",
        "How do I use",
    ),
    "translation": (
        "Please put this German text into English: Die",
        "What does this mean in English? Ich",
        "English translation, please: Der",
        "From German into English: Wenn",
        "Please put this German text into English: Es",
        "Translate the following sentence into French:",
        "Translate the following text from Spanish to English:",
        "Translate to German:",
        "What does the phrase",
    ),
    "summarisation": (
        "Give a short summary of this:",
        "Summarize the following article:\n\n",
        "What is this article about? (Reuters)",
        "Sum this up in two sentences. A man",
        "In short, what does this say? The",
        "Give a short summary of this: By",
        "Extract the names of all people from this text:\n\n",
        "Read the following passage and answer the question.\n\n",
        "Here are some paragraphs.\n\n",
    ),
    "question": (
        *("What", "What is", "Who", "Who was the", "When did", "Where", "Where is", "Why", "How"),
        *("How many", "Which", "Is it true that", "What is the difference between", "Describe"),
        *("What was the name of", "Who wrote", "Who played", "Explain", "Explain why"),
    ),
    "mathematics": (
        *("Solve", "Calculate", "Find the", "A train", "A store sells", "A farmer has", "If a"),
        *("Suppose that", "What is the probability", "Sarah has", "Tom bought", "There are"),
        *("The average of", "Evaluate the integral", "Prove that", "John earns", "A rectangle"),
    ),
    "writing": (
        *("Write", "Write a story about", "Write an email to", "Write a poem", "Write an essay"),
        *("Imagine", "Pretend to be", "Compose", "Create", "Draft a", "Rewrite", "Edit", "Suggest"),
        *("Give me", "List", "Compare", "Design", "Discuss", "Act as", "Describe a character"),
        *("Outline", "Analyze", "Provide", "Come up with", "Write a dialogue between"),
    ),
}

# For each language: subjects, verbs with objects, and endings; every combination is a sentence.
SENTENCES = {
    "German": (
        "Die Regierung; Der Minister; Das Unternehmen; Die Polizei; Der Präsident; Die Stadt; "
        "Mein Nachbar; Die Wissenschaftler; Der Verein; Die Schule; Eine Sprecherin; Der Fahrer; "
        "Die Kommission; Das Krankenhaus; Der Trainer; Die Bank; Unsere Familie; Die Zeitung",
        "hat am Montag einen neuen Plan vorgestellt; will die Steuern im nächsten Jahr senken; "
        "sucht nach einer Lösung für das Problem; hat die Ergebnisse der Studie veröffentlicht; "
        "plant den Bau einer neuen Brücke; warnt vor den Folgen der Krise; "
        "hat gestern mehrere Zeugen befragt; möchte mehr Geld für Bildung ausgeben; "
        "hat die Entscheidung des Gerichts begrüßt; verkauft seit vielen Jahren alte Bücher; "
        "rechnet mit einem kalten Winter; eröffnet bald ein kleines Museum am Fluss",
        "; , obwohl die Kosten gestiegen sind; , weil viele Menschen darauf warten; "
        ", sagte ein Sprecher am Dienstag; und hofft auf die Hilfe der Nachbarn; "
        ", wie aus einem Bericht hervorgeht; , um die Bürger besser zu informieren; "
        ", aber niemand weiß, wann es beginnt",
    ),
    "French": (
        "Le gouvernement; La ville; Le président; Mon voisin; L'entreprise; La police; Le médecin; "
        "L'école; Le journal; Ma sœur; Le musée; La ministre",
        "a présenté un nouveau projet lundi; cherche une solution au problème; "
        "veut construire un pont sur la rivière; a publié les résultats de l'étude; "
        "vend des livres anciens depuis des années; prévoit de baisser les impôts; "
        "a interrogé plusieurs témoins hier; attend une réponse du tribunal",
        "; , même si les coûts ont augmenté; , parce que beaucoup de gens attendent; "
        ", selon un rapport récent; et espère l'aide des habitants; pour mieux informer le public",
    ),
    "Spanish": (
        "El gobierno; La ciudad; El presidente; Mi vecino; La empresa; La policía; El médico; "
        "La escuela; El periódico; Mi hermana; El museo; La ministra",
        "presentó un nuevo plan el lunes; busca una solución al problema; "
        "quiere construir un puente sobre el río; publicó los resultados del estudio; "
        "vende libros antiguos desde hace años; prevé bajar los impuestos; "
        "interrogó ayer a varios testigos; espera una respuesta del tribunal",
        "; , aunque los costes han subido; , porque mucha gente lo espera; "
        ", según un informe reciente; y espera la ayuda de los vecinos;"
        " para informar mejor al público",
    ),
}

LANGUAGES = tuple(SENTENCES)
