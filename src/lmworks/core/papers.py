"""The forty-seven published methods of lmworks, as text: what they are, what they fill, where their code is.

A method whose `module` is None is planned: nothing of it can be named in a recipe yet.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Method:
    """One published method."""

    title: str
    """The paper's title."""
    year: int
    """When it first appeared."""
    line: str
    """What it does, in a few words."""
    fills: tuple[str, ...]
    """The slots its parts stand in, or the stage of a model's life it belongs to."""
    module: str | None = None
    """Its module below `lmworks`, whose docstring is its page; None while it is planned."""

    @property
    def planned(self) -> bool:
        """Whether there is no code yet."""
        return self.module is None


METHODS: dict[str, Method] = {
    "adapt-pruner": Method(
        "Adapt-Pruner: Adaptive Structural Pruning for Efficient Small Language Model Training",
        2025,
        "cut channels and heads, more from layers that change their input least, and train in between",
        ("reshape", "watcher"),
    ),
    "admire-bayesopt": Method(
        "ADMIRE-BayesOpt: Accelerated Data MIxture RE-weighting for Language Models with Bayesian Optimization",
        2025,
        "choose the next mixture and model size to try by information per unit of cost",
        ("mixture",),
        "methods.admire_bayesopt",
    ),
    "am-distilled": Method(
        "1.4 Million Open-Source Distilled Reasoning Dataset to Empower Large Language Model Training",
        2025,
        "one verified set of reasoning traces out of many question sets",
        ("make",),
    ),
    "attrprompt": Method(
        "Large Language Model as Attributed Training Data Generator: A Tale of Diversity and Bias",
        2023,
        "labelled text from class names, prompted with varied attributes",
        ("make",),
    ),
    "bert2bert": Method(
        "bert2BERT: Towards Reusable Pretrained Language Models",
        2021,
        "start a large model from a small trained one, wider and deeper",
        ("reshape", "watcher"),
    ),
    "chemllm": Method(
        "ChemLLM: A Chemical Large Language Model",
        2024,
        "instruction dialogues and tests out of rows of a scientific database",
        ("make",),
    ),
    "chimed-gpt": Method(
        "ChiMed-GPT: A Chinese Medical LLM with Full Training Regime and Better Alignment to Human Preferences",
        2023,
        "the whole regime from continued pre-training to alignment, for one field",
        ("post",),
    ),
    "coat": Method(
        "COAT: Compressing Optimizer states and Activation for Memory-Efficient FP8 Training",
        2024,
        "optimizer moments and saved activations in 8-bit floats",
        ("optimizer", "saved"),
        "methods.coat",
    ),
    "colm": Method(
        "Mini-batch Coresets for Memory-efficient Language Model Training on Data Mixtures",
        2024,
        "train on the half of a batch that stands best for all of it, small sources whole",
        ("selector",),
        "methods.colm",
    ),
    "compile": Method(
        "ComPile: A Large IR Dataset from Production Sources",
        2023,
        "a corpus of LLVM intermediate code from real packages, with provenance",
        ("data",),
    ),
    "concept-drift": Method(
        "Adapting Multi-modal Large Language Model to Concept Drift in the Long-tailed Open World",
        2024,
        "a similarity that keeps rare classes from being crushed by frequent ones",
        ("objective", "watcher"),
    ),
    "ctf-dojo": Method(
        "Training Language Model Agents to Find Vulnerabilities with CTF-Dojo",
        2025,
        "old security contests as self-checking environments for agents",
        ("agent", "post"),
    ),
    "cycleqd": Method(
        "Agent Skill Acquisition for Large Language Models via CycleQD",
        2024,
        "breed merged models that cover all skill trade-offs, without gradients",
        ("reshape",),
    ),
    "distca": Method(
        "Efficient Long-context Language Model Training by Core Attention Disaggregation",
        2025,
        "attention cut into tasks that a planner shares over all GPUs",
        ("layout",),
        "methods.distca",
    ),
    "dp-lora": Method(
        "Differentially Private Low-Rank Adaptation of Large Language Model Using Federated Learning",
        2023,
        "parties tune one model together and send only noisy low-rank factors",
        ("selector", "gradient"),
    ),
    "dragonfly": Method(
        "Dragonfly: Multi-Resolution Zoom Supercharges Large Visual-Language Model",
        2024,
        "small details of large pictures within a fixed number of tokens",
        ("model",),
    ),
    "factagent": Method(
        "Large Language Model Agent for Fake News Detection",
        2024,
        "check a news claim by a fixed list of small questions",
        ("agent",),
    ),
    "farms": Method(
        "Eigenspectrum Analysis of Neural Networks without Aspect Ratio Bias",
        2025,
        "tell well trained layers from badly trained ones by their weights alone",
        ("watcher", "audit"),
    ),
    "frontier-zero": Method(
        "Scaling Large Language Model Training on Frontier with Low-Bandwidth Partitioning",
        2025,
        "shard states along the bandwidth ladder of the cluster",
        ("layout",),
        "methods.frontier_zero",
    ),
    "geoground": Method(
        "GeoGround: A Unified Large Vision-Language Model for Remote Sensing Visual Grounding",
        2024,
        "boxes, rotated boxes and masks as plain text tokens",
        ("make", "objective"),
    ),
    "ghost-sentences": Method(
        "Protecting Copyrighted Material with Unique Identifiers in Large Language Model Training",
        2024,
        "passphrases in published text, and a test whether a model was trained on it",
        ("data", "audit"),
    ),
    "green-ai": Method(
        "Green AI: Exploring Carbon Footprints, Mitigation Strategies, and Trade Offs in Large Language Model Training",
        2024,
        "energy, carbon and cost of a run, before and after",
        ("watcher", "plan"),
        "methods.green_ai",
    ),
    "hpt": Method(
        "Towards a Unified View of Large Language Model Post-Training",
        2025,
        "learn from demonstrations where rollouts fail, from rewards where they succeed",
        ("post",),
    ),
    "iaa": Method(
        "IAA: Inner-Adaptor Architecture Empowers Frozen Large Language Model with Multimodal Capabilities",
        2024,
        "a picture route beside a frozen text model, which stays bit-identical",
        ("model",),
    ),
    "irl": Method(
        "Inverse Reinforcement Learning Meets Large Language Model Post-Training: Basics, Advances, and Opportunities",
        2025,
        "reward models: made, tested, used and distrusted",
        ("post",),
    ),
    "llm4sgg": Method(
        "Weakly Supervised Fine-grained Scene Graph Generation via Large Language Model",
        2023,
        "scene graphs out of plain captions",
        ("make",),
    ),
    "matchmaker": Method(
        "Matchmaker: Self-Improving Large Language Model Programs for Schema Matching",
        2024,
        "which column of one database is which of another, with an honest none",
        ("agent",),
    ),
    "megascale": Method(
        "MegaScale: Scaling Large Language Model Training to More Than 10,000 GPUs",
        2024,
        "parallel block, sliding window and LAMB; a runtime that survives faults",
        ("optimizer", "model"),
        "methods.megascale",
    ),
    "megatron": Method(
        "Efficient Large-Scale Language Model Training on GPU Clusters Using Megatron-LM",
        2021,
        "tensor, pipeline and data parallelism composed, and rules to choose them",
        ("layout", "plan"),
        "methods.megatron",
    ),
    "mindgpt-4ov": Method(
        "MindGPT-4ov: An Enhanced MLLM via a Multi-Stage Post-Training Paradigm",
        2025,
        "a picture model for one field without losing its general skill",
        ("make", "post"),
    ),
    "mmtrail": Method(
        "MMTrail: A Multimodal Trailer Video Dataset with Language and Music Descriptions",
        2024,
        "training clips with captions from every channel of a video",
        ("make",),
    ),
    "multilingual-rephrase": Method(
        "Rephrasing natural text data with different languages and quality levels for Large Language Model "
        "pre-training",
        2024,
        "whether rephrasing pays for a language and a corpus, and how to do it",
        ("make",),
    ),
    "pathology-cot": Method(
        "Pathology-CoT: Learning Visual Chain-of-Thought Agent from Expert Whole Slide Image Diagnosis Behavior",
        2025,
        "how experts look through huge pictures, as training data for an agent",
        ("agent", "data"),
    ),
    "peatmoss": Method(
        "PeaTMOSS: A Dataset and Initial Analysis of Pre-Trained Models in Open-Source Software",
        2024,
        "what each model came from, under which licence, and who uses it",
        ("audit",),
    ),
    "pipette": Method(
        "Pipette: Automatic Fine-grained Large Language Model Training Configurator for Real-World Clusters",
        2024,
        "the layout and the rank placement for a cluster's measured links",
        ("layout", "plan"),
        "methods.pipette",
    ),
    "prox": Method(
        "Programming Every Example: Lifting Pre-training Data Quality like Experts at Scale",
        2024,
        "a small model writes a program that cleans each document",
        ("make",),
    ),
    "regmix": Method(
        "RegMix: Data Mixture as Regression for Language Model Pre-training",
        2024,
        "many tiny runs predict the best mixture for a big one",
        ("mixture",),
        "methods.regmix",
    ),
    "send": Method(
        "Hallucination Detox: Sensitive Neuron Dropout (SeND) for Large Language Model Training",
        2024,
        "switch off hidden dimensions that swing most between checkpoints",
        ("watcher",),
    ),
    "slimpajama-dc": Method(
        "SlimPajama-DC: Understanding Data Combinations for LLM Training",
        2023,
        "clean, deduplicate globally, mix sources, and see what each is worth",
        ("data", "mixture", "schedule"),
        "methods.slimpajama_dc",
    ),
    "sophia": Method(
        "Sophia: A Scalable Stochastic Second-order Optimizer for Language Model Pre-training",
        2023,
        "momentum over a cheap curvature estimate, clipped in every coordinate",
        ("optimizer",),
        "methods.sophia",
    ),
    "ssdtrain": Method(
        "SSDTrain: An Activation Offloading Framework to SSDs for Faster Large Language Model Training",
        2024,
        "saved activations wait on disk for the backward pass",
        ("saved",),
        "methods.ssdtrain",
    ),
    "techgpt2": Method(
        "TechGPT-2.0: A large language model project to solve the task of knowledge graph construction",
        2024,
        "instruction data for entities and relations, with refusals",
        ("make", "post"),
    ),
    "tokenring": Method(
        "TokenRing: An Efficient Parallelism Framework for Infinite-Context LLMs via Bidirectional Communication",
        2024,
        "context-parallel attention that uses both directions of the links",
        ("layout",),
        "methods.tokenring",
    ),
    "torchtitan": Method(
        "TorchTitan: One-stop PyTorch native solution for production ready LLM pre-training",
        2024,
        "the parallel axes, float8 and checkpoints of PyTorch composed over one mesh",
        ("layout",),
        "methods.torchtitan",
    ),
    "tpt": Method(
        "Thinking Augmented Pre-training", 2025, "a machine-written train of thought behind every document", ("make",)
    ),
    "trafficllm": Method(
        "Self-Refined Generative Foundation Models for Wireless Traffic Prediction",
        2024,
        "predict, criticise, refine: forecasts of a load curve",
        ("agent",),
    ),
    "wrap": Method(
        "Rephrasing the Web: A Recipe for Compute and Data-Efficient Language Modeling",
        2024,
        "noisy web text rewritten in chosen styles, half and half with the real",
        ("make",),
    ),
}
