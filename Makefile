# fox.c. `make` builds train_fox, make_shards and test_fox and says what it found; `make help` lists the rest.
#
#   make CC=clang     another compiler             make MPI=0        without MPI
#   make OPENMP=0     one thread                   make SANITIZE=1   ASan + UBSan, everything below build/asan/
#   make CUDA=0       without the GPU              make ARCHS="90a"  only for these chips
#   make NCCL=0       without several GPUs

CC       := $(if $(filter default,$(origin CC)),gcc,$(CC))
SANITIZE ?= 0
MPI      ?= 1
OPENMP   ?= 1
CUDA     ?= 1
FUZZ_SECONDS ?= 60
FUZZ_CC  ?= clang

# ---- where things go: objects in $(BUILD)/, programs beside this file ($(BIN) is empty or ends with a slash)
ifeq ($(SANITIZE),0)
  BUILD := build/release
  BIN   :=
else ifeq ($(SANITIZE),fuzz)
  BUILD := build/fuzz
  BIN   := build/fuzz/
else
  BUILD := build/asan
  BIN   := build/asan/
endif

# ---- what this machine has
null :=
hash := \#
# $(call accepts,FLAGS,HEADER): FLAGS when the compiler makes a program with them that includes HEADER, else nothing
accepts = $(shell printf '$(hash)include <$(2)>\nint main(void) { return 0; }\n' | \
            $(CC) -x c - $(1) -o /dev/null 2>/dev/null && echo '$(1)')

CC_VERSION   := $(shell $(CC) --version 2>/dev/null | head -n 1)
NATIVE_FLAGS := $(call accepts,-march=native,stdio.h)
OPENMP_FLAGS := $(if $(filter-out 0,$(OPENMP)),$(call accepts,-fopenmp,omp.h))
MPICC        := $(if $(filter-out 0,$(MPI)),$(shell command -v mpicc))
MPI_COMPILE  := $(if $(MPICC),$(shell $(MPICC) --showme:compile 2>/dev/null))
MPI_LINK     := $(if $(MPICC),$(shell $(MPICC) --showme:link 2>/dev/null))
MPI_FLAGS    := $(if $(MPI_LINK),$(call accepts,$(MPI_COMPILE) $(MPI_LINK),mpi.h))
NVCC         := $(firstword $(shell command -v nvcc) $(wildcard $(CUDA_HOME)/bin/nvcc /usr/local/cuda/bin/nvcc))
CUDA_ROOT    := $(if $(NVCC),$(patsubst %/bin/,%,$(dir $(NVCC))))
# The CUDA back end needs nvcc and cuBLASLt. The sanitizer and fuzzer builds leave it out: they do not know the GPU.
CUBLASLT     := $(firstword $(wildcard $(foreach root,$(CUDA_ROOT) /usr,$(root)/include/cublasLt.h)))
USE_CUDA     := $(and $(filter 0,$(SANITIZE)),$(filter-out 0,$(CUDA)),$(NVCC),$(CUBLASLT))
NVCC_ARCHS   := $(if $(USE_CUDA),$(shell $(NVCC) --list-gpu-arch 2>/dev/null))
ARCHS        ?= 80 $(if $(filter compute_90,$(NVCC_ARCHS)),90a)
# Several GPUs need NCCL's header and library. NCCL_HOME may name its folder (the one with include/ and lib/).
NCCL         ?= 1
NCCL_ROOTS   := $(NCCL_HOME) $(CUDA_ROOT) /usr /usr/local
NCCL_HEADER  := $(firstword $(wildcard $(foreach root,$(NCCL_ROOTS),$(root)/include/nccl.h)))
NCCL_LIBRARY := $(firstword $(wildcard $(foreach root,$(NCCL_ROOTS),$(foreach dir,lib lib64 lib/x86_64-linux-gnu lib/aarch64-linux-gnu,\
                  $(root)/$(dir)/libnccl.so $(root)/$(dir)/libnccl.so.2))))
USE_NCCL     := $(and $(USE_CUDA),$(filter-out 0,$(NCCL)),$(NCCL_HEADER),$(NCCL_LIBRARY))

define FOUND
compiler  $(CC_VERSION)
OpenMP    $(if $(OPENMP_FLAGS),yes,$(if $(filter 0,$(OPENMP)),switched off,not found): one thread)
MPI       $(if $(MPI_FLAGS),$(MPICC): mpirun starts several ranks,$(if $(filter 0,$(MPI)),switched off,Open MPI not \
found): scripts/launch.sh starts several ranks)
CUDA      $(or $(NVCC),nvcc not found)
NCCL      $(if $(USE_NCCL),$(NCCL_LIBRARY): several GPUs,$(if $(filter 0,$(NCCL)),switched off,$(if $(and $(NCCL_HEADER),$(NCCL_LIBRARY)),\
not used without CUDA,nccl.h or libnccl not found)): one GPU)
building  $(if $(USE_CUDA),the CUDA program for $(foreach a,$(ARCHS),sm_$(a)) (bf16; on the CPU in float32 where there is no \
GPU),the CPU program (float32))$(if $(and $(NVCC),$(filter 0,$(CUDA))),; CUDA is switched off)$(if \
$(and $(NVCC),$(if $(CUBLASLT),,x)),; nvcc is not used: cublasLt.h not found)
endef
# Expanded in every recipe that compiles, shown by the first of them: a build says once what it is made of.
announce = $(if $(announced),,$(eval announced := yes)$(info $(FOUND)))

# ---- flags. Never -Ofast or -ffast-math: the program must see NaN and Inf, and sums keep their order.
CFLAGS_BASE := -std=gnu11 -Wall -Wextra -MMD -MP -pthread $(OPENMP_FLAGS)
LDLIBS      := $(OPENMP_FLAGS) -pthread -lm
ifeq ($(SANITIZE),0)
  OPTIMIZE := -O3 $(NATIVE_FLAGS)
else ifeq ($(SANITIZE),fuzz)
  OPTIMIZE := -O1 -g -fsanitize=fuzzer-no-link,address,undefined -fno-sanitize-recover=undefined
  LDLIBS   += -fsanitize=fuzzer,address,undefined
else
  OPTIMIZE := -O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=undefined
  LDLIBS   += -fsanitize=address,undefined
endif
ifneq ($(MPI_FLAGS),)
  CFLAGS_BASE += -DFOX_MPI $(MPI_COMPILE)
  LDLIBS      += $(MPI_LINK)
endif
ifneq ($(USE_CUDA),)
  CUDA_FLAGS := -DFOX_CUDA -I$(CUDA_ROOT)/include
  LDLIBS     += -L$(CUDA_ROOT)/lib64 -Wl,-rpath,$(CUDA_ROOT)/lib64 -lcublasLt -lcudart -lstdc++
  ifneq ($(USE_NCCL),)
    CUDA_FLAGS += -DFOX_NCCL -I$(dir $(NCCL_HEADER))
    LDLIBS     += $(NCCL_LIBRARY) -Wl,-rpath,$(dir $(NCCL_LIBRARY))
  endif
  # Code for each chip, and PTX that newer ones compile for themselves.
  GENCODE    := $(foreach a,$(ARCHS),-gencode arch=compute_$(a),code=sm_$(a)) -gencode arch=compute_80,code=compute_80
  NVCC_FLAGS := -std=c++17 -O3 $(GENCODE) -MMD -MP -Xcompiler -Wall,-Wextra $(CUDA_FLAGS)
endif
ALL_CFLAGS := $(CFLAGS_BASE) $(CUDA_FLAGS) $(OPTIMIZE) $(CFLAGS)

# The stamp holds the compiler and the flags, and changes only when they do: objects depend on it.
STAMP := $(BUILD)/flags
ifeq ($(filter clean help fuzz fuzz-run,$(MAKECMDGOALS)),)
  $(shell mkdir -p $(BUILD); printf '%s\n' '$(CC) $(CC_VERSION) $(ALL_CFLAGS) $(NVCC_FLAGS) $(LDFLAGS) $(LDLIBS)' > $(STAMP).new; \
          cmp -s $(STAMP).new $(STAMP) && rm $(STAMP).new || mv $(STAMP).new $(STAMP))
endif

# ---- what is built from what
KERNELS  := $(if $(USE_CUDA),$(patsubst %.cu,$(BUILD)/%.o,$(wildcard cuda/*.cu)))
LIBRARY  := $(patsubst %.c,$(BUILD)/%.o,$(wildcard train/*.c cpu/*.c $(if $(USE_CUDA),cuda/*.c))) $(KERNELS)
TESTS    := $(patsubst %.c,$(BUILD)/%.o,$(wildcard tests/*.c))
PROGRAMS := $(addprefix $(BIN),train_fox make_shards test_fox $(if $(USE_NCCL),nccl_bandwidth))
TOOLS    := $(BUILD)/check_mass $(BUILD)/fresh_weights
FUZZERS  := $(patsubst fuzz/%.c,$(BUILD)/%,$(wildcard fuzz/fuzz_*.c))
OBJECTS  := $(LIBRARY) $(TESTS) $(BUILD)/train_fox.o $(BUILD)/test_fox.o $(BUILD)/scripts/make_shards.o \
            $(BUILD)/scripts/nccl_bandwidth.o $(TOOLS:$(BUILD)/%=$(BUILD)/dev/%.o) \
            $(patsubst %.c,$(BUILD)/%.o,$(wildcard fuzz/fuzz_*.c))

.PHONY: all test emulated demo bench tools clean help fuzz fuzz-run fuzzers
.DELETE_ON_ERROR:
all: $(PROGRAMS) $(BUILD)/fresh_weights # which dev/official.py runs

$(BIN)train_fox:   $(BUILD)/train_fox.o
$(BIN)make_shards: $(BUILD)/scripts/make_shards.o
$(BIN)nccl_bandwidth: $(BUILD)/scripts/nccl_bandwidth.o
$(BIN)test_fox:    $(BUILD)/test_fox.o $(TESTS)
$(FUZZERS): $(BUILD)/%: $(BUILD)/fuzz/%.o
$(TOOLS): $(BUILD)/%: $(BUILD)/dev/%.o
$(PROGRAMS) $(TOOLS) $(FUZZERS): $(BUILD)/libfox.a
	@echo 'link      $@'
	@$(CC) $(LDFLAGS) $(filter %.o,$^) $(BUILD)/libfox.a $(LDLIBS) -o $@

$(BUILD)/libfox.a: $(LIBRARY)
	@rm -f $@ && ar rcs $@ $^

# $(call compile,FLAGS)
compile = $(announce)@mkdir -p $(@D) && echo 'compile   $<' && $(CC) $(ALL_CFLAGS) $(1) -c $< -o $@
$(BUILD)/%.o: %.c $(STAMP)
	$(call compile)
$(BUILD)/train_fox.o: train_fox.cu $(STAMP) # main() is plain C as well as CUDA C++: the same object with and without nvcc
	$(call compile,-x c)
$(BUILD)/test_fox.o: test_fox.c $(STAMP) # FOX_HOPPER: on such a chip the tests demand the kernels that are its own
	$(call compile,$(if $(filter 90a,$(ARCHS)),-DFOX_HOPPER))
$(BUILD)/cuda/%.o: cuda/%.cu $(STAMP)
	$(announce)@mkdir -p $(@D) && echo 'compile   $<' && $(NVCC) $(NVCC_FLAGS) -c $< -o $@
$(STAMP):
-include $(OBJECTS:.o=.d)

test: $(PROGRAMS)
	@$(or $(BIN),./)test_fox $(if $(filter-out 0,$(SANITIZE)),--quick)

# The attention kernels of the GPU, as C++ for the CPU. Threads are coroutines that jump from stack to stack, and one thread
# has all thread-local variables, which the flags allow.
EMULATED := $(BUILD)/test_emulated
emulated: $(EMULATED)
	@$<
$(EMULATED): tests/test_emulated.cc $(STAMP)
	$(if $(CUDA_ROOT),,$(error make emulated: nvcc is not found, and the headers beside it are needed))
	@mkdir -p $(@D) && echo 'compile   $<' && $(CXX) -std=c++20 -O2 -Wall -Wextra -Wno-unknown-pragmas -Wno-psabi -fno-strict-aliasing \
	    -fno-extern-tls-init -U_FORTIFY_SOURCE -MMD -MP -isystem $(CUDA_ROOT)/include $< -o $@
-include $(EMULATED).d

demo: $(PROGRAMS)
	@sh scripts/demo.sh

bench: $(PROGRAMS)
	@sh scripts/bench_cpu.sh

tools: $(TOOLS)

# The fuzzers are built apart, by clang, with the sanitizers in every object.
fuzz:
	@$(MAKE) --no-print-directory SANITIZE=fuzz MPI=0 OPENMP=0 CC=$(FUZZ_CC) fuzzers
fuzzers: $(FUZZERS)
fuzz-run: fuzz
	@set -e; for f in $(patsubst fuzz/%.c,%,$(wildcard fuzz/fuzz_*.c)); do \
	    echo "== $$f, $(FUZZ_SECONDS) s"; mkdir -p build/fuzz/corpus/$$f; \
	    build/fuzz/$$f -max_total_time=$(FUZZ_SECONDS) -verbosity=0 -print_final_stats=1 \
	        -artifact_prefix=build/fuzz/$$f- build/fuzz/corpus/$$f; done

clean:
	rm -rf build/release build/asan build/fuzz demo train_fox make_shards test_fox nccl_bandwidth

help:
	@echo 'make            train_fox, make_shards, test_fox; prints what was found and what is built'
	@echo 'make test       the tests; make SANITIZE=1 test: the quick suite under ASan and UBSan'
	@echo 'make emulated   tests the attention kernels of the GPU on a CPU, with the headers of the CUDA Toolkit'
	@echo 'make demo       trains a small FoX on text of this machine, within 4 minutes on two cores'
	@echo 'make bench      speed of the CPU program in tokens/s'
	@echo 'make tools      build/release/check_mass: what pruning loses inside a trained model'
	@echo 'make fuzz       the fuzzers (clang); make fuzz-run FUZZ_SECONDS=60 runs each of them'
	@echo 'make clean      removes programs, objects and the demo; results of scripts below build/ stay'
	@echo 'Settings: CC=clang, CUDA=0, ARCHS="80 90a", NCCL=0, MPI=0, OPENMP=0, SANITIZE=1, CFLAGS=..., LDFLAGS=..., CUDA_HOME=DIR, NCCL_HOME=DIR'
	@echo 'Then: ./make_shards --help, ./train_fox --help'
