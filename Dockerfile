# On CPUs:        docker build -t fairness_dft .
# On NVIDIA GPUs: docker build -t fairness_dft --build-arg BASE=nvidia/cuda:12.8.1-runtime-ubuntu24.04 --build-arg TORCH_INDEX= .
#   docker run --rm -v "$PWD":/work fairness_dft quickstart        (on GPUs with --gpus all)
ARG BASE=python:3.12-slim
FROM ${BASE}

# An index to take PyTorch from before PyPI, whose wheels bring CUDA; empty for PyPI alone.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu

# Python where the base image has none, and the libraries that OpenCV loads.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends libgl1 libglib2.0-0 \
    && (command -v python3 >/dev/null || apt-get install --yes --no-install-recommends python3 python3-venv) \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /opt/fairness_dft
ENV PATH=/opt/fairness_dft/bin:$PATH

WORKDIR /source
COPY . .
RUN pip install --no-cache-dir --constraint constraints.txt ${TORCH_INDEX:+--extra-index-url $TORCH_INDEX} torch \
    && pip install --no-cache-dir --constraint constraints.txt .

# Runs and downloaded models go to the folder that is mounted here.
WORKDIR /work
ENV HF_HOME=/work/.cache/huggingface
ENTRYPOINT ["fairness-dft"]
CMD ["--help"]
