# millm: a PostgreSQL extension that turns the server into an LLM server.
#
# `make demo` and `make check` are all that a new user needs; `make help` lists the rest.
# One page builds it all: the extension (PGXS), its helper programs, their tests.  Objects lie
# under build/, one directory per variant, so a sanitizer build never mixes with an ordinary one.

MILLM_VERSION = 1.0.0
BUILD  ?= build

# The workflow targets are scripts that work before anything is installed, PostgreSQL included.
WORKFLOW = help setup demo check check-long soak playground playground-stop
ifeq ($(filter-out $(WORKFLOW),$(or $(MAKECMDGOALS),all)),)
.DEFAULT_GOAL = help

help:
	@echo "make demo              install what is missing, build, download a model, generate text, over HTTP too"
	@echo "make check             the same set-up, then every test (35 to 40 minutes on two CPUs)"
	@echo "make check-long        the tests that take longer"
	@echo "make soak              an hour of everything that may happen to requests  SOAK_MINUTES=10"
	@echo "make playground        a private server with the extension, a bridge and a test hub; playground-stop ends it"
	@echo "make setup             only install the packages that building and testing need"
	@echo
	@echo "make                   build the extension, millm-engine, millm-hub and millm-bridge"
	@echo "make install           install them into the PostgreSQL of pg_config"
	@echo "make unit              build and run the unit tests     SAN=address,undefined or SAN=thread"
	@echo "make fuzz              run each fuzz target             FUZZ_SECONDS=20 FUZZ_SEED=1"
	@echo "make cuda-report       registers, shared memory and spills of each CUDA kernel"
	@echo "make lint              who may include whom, versions that must agree"
	@echo "make clean             remove build/"
	@echo
	@echo "Variables: PG_CONFIG, CC, SAN, BUILD, DEBUG=1, V=1 (show commands), NVCC (empty: no CUDA module), CUDA_ARCHS"

setup:
	@dev/setup all
demo check playground playground-stop check-long:
	@dev/$@
soak:
	@test/soak/run
.PHONY: $(WORKFLOW)

else # ----------------------------------------------------------------------------------------

# One line for each file; V=1 shows the commands.
Q = $(if $(V),,@)

# --- The extension: src/pg and the two rooms that it may see, through PGXS ---------------------
EXTENSION   = millm
MODULE_big  = millm
DATA        = sql/millm--$(MILLM_VERSION).sql
PG_CPPFLAGS = -Isrc/pg -Isrc/wire -Isrc/base
PG_CFLAGS   = -Wextra -Wno-unused-parameter -Wno-sign-compare -Wno-missing-field-initializers
OBJS        = $(patsubst src/%.c,$(BUILD)/module/%.o,$(wildcard src/pg/*.c) src/wire/wire.c $(wildcard src/base/*.c))
EXTRA_CLEAN = build
override with_llvm = no
PG_CONFIG  ?= pg_config
PGXS       := $(shell $(PG_CONFIG) --pgxs 2>/dev/null)
ifeq ($(wildcard $(PGXS)),)
$(error $(PG_CONFIG) is not there or has no PGXS: run "make setup", or set PG_CONFIG)
endif
include $(PGXS)

$(BUILD)/module/%.o: src/%.c
	@mkdir -p $(@D) && echo "  CC  $<"
	$(Q)$(CC) $(CFLAGS) $(CFLAGS_SL) $(CPPFLAGS) -MMD -MP -c -o $@ $<

# --- The helper programs: every other room ------------------------------------------------------
ENGINE_ROOMS  = base wire serve token chat quant kernel model hub engine
DEPS_PKG      = libcurl jansson libpcre2-8 libutf8proc libcrypto libevent libevent_pthreads
ENGINE_CFLAGS = -std=c11 -D_GNU_SOURCE $(if $(DEBUG),-O1 -DMILLM_DEBUG,-O2) -g -fno-omit-frame-pointer -Wall -Wextra -Wvla \
                $(ENGINE_ROOMS:%=-Isrc/%) $(shell pkg-config --cflags $(DEPS_PKG)) $(SAN_FLAGS)
ENGINE_LIBS   = $(shell pkg-config --libs $(DEPS_PKG)) -lpthread -ldl -lm
SAN_FLAGS     = $(if $(SAN),-fsanitize=$(SAN) -fno-sanitize-recover=all)
ROOM_SOURCES  = $(filter-out %/main.c,$(wildcard $(ENGINE_ROOMS:%=src/%/*.c)))
LIB           = $(BUILD)/libmillm.a
BRIDGE        = $(BUILD)/millm-bridge
PROGRAMS      = $(BUILD)/millm-engine $(BUILD)/millm-hub $(BRIDGE)

# Instruction sets belong to single files; nothing that others link may be compiled with them.
$(BUILD)/src/kernel/avx2.o $(BUILD)/src/kernel/avx2_quant.o $(BUILD)/src/kernel/avx2_tiles.o: ISA = -mavx2 -mfma -mf16c
AVX512_ISA = -mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512bf16 -mavx512vnni -mavx512vbmi -mfma -mf16c
$(BUILD)/src/kernel/avx512.o $(BUILD)/src/kernel/avx512_quant.o $(BUILD)/src/kernel/avx512_tiles.o $(BUILD)/src/kernel/amx.o: ISA = $(AVX512_ISA)
$(BUILD)/src/kernel/%.o:      OPT = -O3
$(BUILD)/src/quant/%.o:       OPT = -O3
$(BUILD)/src/engine/shortlist.o $(BUILD)/src/engine/sampler.o: OPT = -O3

# Compiled tokenizers are thrown away when the code that made them changes.
$(BUILD)/src/token/image.o: DEFINES = -DMILLM_TOKEN_SOURCES='"$(firstword $(shell cat src/token/*.[ch] | md5sum))"'
$(BUILD)/src/token/image.o: $(wildcard src/token/*.[ch])
# The CUDA module and the engine pass each other what these declare: a module of another checksum is refused.
BACKEND_HEADERS = $(addprefix src/,engine/cuda_module.h engine/backend.h engine/shortlist.h model/model.h base/tensor.h base/error.h base/errors.def)
BACKEND_ABI    := $(shell cat $(BACKEND_HEADERS) | cksum | cut -d' ' -f1)u
$(BUILD)/src/engine/device.o: DEFINES = -DMILLM_BACKEND_ABI=$(BACKEND_ABI)

all: $(PROGRAMS)
programs: $(PROGRAMS)

$(BUILD)/src/%.o: src/%.c
	@mkdir -p $(@D) && echo "  CC  $<"
	$(Q)$(CC) $(ENGINE_CFLAGS) $(OPT) $(ISA) $(DEFINES) -MMD -MP -c -o $@ $<

$(LIB): $(ROOM_SOURCES:src/%.c=$(BUILD)/src/%.o)
	@rm -f $@
	$(Q)ar rcs $@ $^

$(BUILD)/millm-%: $(BUILD)/src/%/main.o $(LIB)
	@echo "  LD  $@"
	$(Q)$(CC) $(ENGINE_CFLAGS) -o $@ $^ $(ENGINE_LIBS)

# The bridge: its own room and base, libpq instead of everything else
BRIDGE_PKG    = libevent_core jansson libcrypto
BRIDGE_OBJS   = $(patsubst src/%.c,$(BUILD)/src/%.o,$(wildcard src/bridge/*.c src/base/*.c))
$(BUILD)/src/bridge/%.o: ENGINE_CFLAGS := $(filter-out -Isrc/%,$(ENGINE_CFLAGS)) -Isrc/bridge -Isrc/base -I$(shell $(PG_CONFIG) --includedir)
# openapi.json is a part of the program
$(BUILD)/src/bridge/openapi.o: src/bridge/openapi.S src/bridge/openapi.json
	@mkdir -p $(@D) && echo "  AS  $<"
	$(Q)$(CC) -c -o $@ $<
$(BRIDGE): $(BRIDGE_OBJS) $(BUILD)/src/bridge/openapi.o
	@echo "  LD  $@"
	$(Q)$(CC) $(ENGINE_CFLAGS) -o $@ $^ -L$(shell $(PG_CONFIG) --libdir) -lpq $(shell pkg-config --libs $(BRIDGE_PKG)) -lpthread

# --- The CUDA module: opened at run time, linked by nobody; without nvcc there is none, which is a normal build ----
NVCC       ?= $(shell command -v nvcc)
CUDA_HOME  ?= $(patsubst %/bin/nvcc,%,$(shell sed -n 's,^exec \(.*/nvcc\) .*,\1,p' $(NVCC) 2>/dev/null | grep . || readlink -f $(NVCC)))
# of these, what this nvcc can compile for; newer devices compile the last one's PTX themselves
CUDA_KNOWN := $(if $(NVCC),$(patsubst sm_%,%,$(shell $(NVCC) --list-gpu-code 2>/dev/null)))
CUDA_ARCHS ?= $(filter $(CUDA_KNOWN),75 80 86 89 90 100 120)
CUDA_MODULE = $(if $(NVCC),$(BUILD)/libmillm_cuda.so)
CUDA_C      = backend_cuda blas device_memory driver experts faults fetch module nvml queue upload weights
CUDA_KERNELS = attention attention_rows attention_tile kernels mixture product
# FAULTS=1: a module that fails where a test asks for it (cuda/faults.h), in a BUILD of its own
FAULT_FLAGS = $(if $(FAULTS),-DMILLM_FAULTS)
CUDA_CFLAGS = $(FAULT_FLAGS) -Icuda -DMILLM_BACKEND_ABI=$(BACKEND_ABI) -fPIC -fvisibility=hidden
CUDA_TARGETS = $(foreach a,$(CUDA_ARCHS),-gencode arch=compute_$a,code=sm_$a) \
               -gencode arch=compute_$(lastword $(CUDA_ARCHS)),code=compute_$(lastword $(CUDA_ARCHS))

# a sixth of the bytes, of an nvcc that knows it
CUDA_COMPRESSED := $(if $(NVCC),$(shell $(NVCC) --help 2>/dev/null | grep -q -e --compress-mode && echo --compress-mode=size))

all: $(CUDA_MODULE)
$(BUILD)/cuda/%.o: cuda/%.c
	@mkdir -p $(@D) && echo "  CC  $<"
	$(Q)$(CC) $(ENGINE_CFLAGS) $(CUDA_CFLAGS) -isystem $(CUDA_HOME)/include -MMD -MP -c -o $@ $<
$(BUILD)/cuda/error.o: src/base/error.c
	@mkdir -p $(@D)
	$(Q)$(CC) $(ENGINE_CFLAGS) $(CUDA_CFLAGS) -MMD -MP -c -o $@ $<
# ptxas tells registers and spills of each kernel: `make cuda-report`
$(CUDA_KERNELS:%=$(BUILD)/cuda/%.o): $(BUILD)/cuda/%.o: cuda/%.cu
	@mkdir -p $(@D) && echo "  NVCC $< ($(CUDA_ARCHS))"
	$(Q)$(NVCC) -std=c++17 -O3 -lineinfo $(CUDA_COMPRESSED) $(CUDA_TARGETS) $(FAULT_FLAGS) -Isrc/base -Isrc/model -Icuda -Xcompiler -fPIC,-fvisibility=hidden,-fno-exceptions,-fno-threadsafe-statics,-Wall,-Wextra \
		-Xptxas -v -MMD -MP -MF $(@:.o=.d) -c -o $@ $< 2>$(@:.o=.ptxas) || { cat $(@:.o=.ptxas); false; }
	@! grep -E 'warning|error' $(@:.o=.ptxas)
$(BUILD)/libmillm_cuda.so: $(CUDA_C:%=$(BUILD)/cuda/%.o) $(BUILD)/cuda/error.o $(CUDA_KERNELS:%=$(BUILD)/cuda/%.o)
	@echo "  LD  $@"
	$(Q)$(CC) -shared -Wl,-Bsymbolic -Wl,--exclude-libs,ALL -Wl,-z,defs -o $@ $^ $(CUDA_HOME)/lib64/libcudart_static.a -lm -ldl -lrt -lpthread
cuda-report: $(CUDA_KERNELS:%=$(BUILD)/cuda/%.o)
	@dev/cuda-report $(CUDA_KERNELS:%=$(BUILD)/cuda/%.ptxas)

# kernel by kernel (bench/gpu --stage kernels), on a GPU and, to try it out, on the emulated one
$(BUILD)/gpu-kernels: bench/gpu_kernels.c $(CUDA_KERNELS:%=$(BUILD)/cuda/%.o)
	$(Q)$(CC) $(ENGINE_CFLAGS) $(CUDA_CFLAGS) -isystem $(CUDA_HOME)/include -o $@ $^ $(CUDA_HOME)/lib64/libcudart_static.a -lm -ldl -lrt -lpthread
$(BUILD)/emulated/gpu-kernels: bench/gpu_kernels.c $(CUDA_KERNELS:%=$(BUILD)/emulated/%.o) $(BUILD)/emulated/emulated.o
	$(Q)$(CC) $(EMULATED_CFLAGS) -o $@ $^ -lm

# The same sources for this CPU, threads in turns (test/cuda): what shows that the kernels are right where there is no GPU.
EMULATED_CFLAGS = $(ENGINE_CFLAGS) $(CUDA_CFLAGS) -Itest/cuda -DMILLM_CUDA_EMULATED -DMILLM_FAULTS -ffp-contract=off
EMULATED_CXX    = $(filter-out -std=c11 -Wvla,$(EMULATED_CFLAGS)) -std=c++17 -fno-exceptions -fno-rtti -Wno-unknown-pragmas
EMULATED        = $(CUDA_C:%=$(BUILD)/emulated/%.o) $(CUDA_KERNELS:%=$(BUILD)/emulated/%.o) $(BUILD)/emulated/emulated.o
$(BUILD)/emulated/%.o: cuda/%.c
	@mkdir -p $(@D)
	$(Q)$(CC) $(EMULATED_CFLAGS) -MMD -MP -c -o $@ $<
$(CUDA_KERNELS:%=$(BUILD)/emulated/%.o): $(BUILD)/emulated/%.o: cuda/%.cu
	@mkdir -p $(@D)
	$(Q)$(CXX) -x c++ $(EMULATED_CXX) -MMD -MP -c -o $@ $<
$(BUILD)/emulated/emulated.o: test/cuda/emulated.cc
	@mkdir -p $(@D)
	$(Q)$(CXX) $(EMULATED_CXX) -MMD -MP -c -o $@ $<
$(BUILD)/emulated/libmillm_cuda.so: $(EMULATED) $(BUILD)/emulated/error.o
	$(Q)$(CC) $(ENGINE_CFLAGS) -shared -Wl,-Bsymbolic -o $@ $^ -lm -ldl
$(BUILD)/emulated/error.o: src/base/error.c
	@mkdir -p $(@D)
	$(Q)$(CC) $(EMULATED_CFLAGS) -MMD -MP -c -o $@ $<
# a driver that says what its environment tells it to (test/cuda/driver.c), and its management library
$(BUILD)/emulated/driver/libcuda.so.1: test/cuda/driver.c
$(BUILD)/emulated/driver/libnvidia-ml.so.1: test/cuda/nvml.c
$(BUILD)/emulated/driver/libcuda.so.1 $(BUILD)/emulated/driver/libnvidia-ml.so.1:
	@mkdir -p $(@D)
	$(Q)$(CC) $(ENGINE_CFLAGS) -shared -fPIC -o $@ $<
# a cuBLASLt of plain loops (test/cuda/cublaslt.c)
$(BUILD)/emulated/driver/libcublasLt.so.13: test/cuda/cublaslt.c
	@mkdir -p $(@D)
	$(Q)$(CC) $(ENGINE_CFLAGS) -shared -fPIC -Wl,-soname,libcublasLt.so.13 -o $@ $<
# the engine beside its module
$(BUILD)/emulated/millm-engine: $(BUILD)/millm-engine
	@mkdir -p $(@D) && cp -f $< $@
# modules that are refused: of another build, of no millm, and what is no library
$(BUILD)/emulated/other-build/libmillm_cuda.so: test/cuda/other_build.c
	@mkdir -p $(@D)
	$(Q)$(CC) $(ENGINE_CFLAGS) -shared -fPIC -o $@ $<
$(BUILD)/emulated/no-module/libmillm_cuda.so: $(BUILD)/emulated/driver/libcuda.so.1
	@mkdir -p $(@D) && cp -f $< $@
$(BUILD)/emulated/no-library/libmillm_cuda.so: Makefile
	@mkdir -p $(@D) && cp -f $< $@
emulated: $(BUILD)/emulated/libmillm_cuda.so $(addprefix $(BUILD)/emulated/driver/,libcuda.so.1 libnvidia-ml.so.1) $(BUILD)/emulated/millm-engine \
	$(addsuffix /libmillm_cuda.so,$(addprefix $(BUILD)/emulated, /other-build /no-module /no-library))

# --- Install: PGXS installs the module, we install what it starts -------------------------------
HELPER_DIR = $(DESTDIR)$(pkglibdir)/millm/$(MILLM_VERSION)
install: install-helpers
install-helpers: $(PROGRAMS) $(CUDA_MODULE)
	$(MKDIR_P) '$(HELPER_DIR)'
	$(INSTALL_PROGRAM) $(PROGRAMS) '$(HELPER_DIR)/'
	$(MKDIR_P) '$(DESTDIR)$(bindir)'
	$(INSTALL_PROGRAM) $(BRIDGE) '$(DESTDIR)$(bindir)/'
	$(if $(CUDA_MODULE),$(INSTALL_SHLIB) $(CUDA_MODULE) '$(HELPER_DIR)/')
uninstall: uninstall-helpers
uninstall-helpers:
	rm -rf '$(HELPER_DIR)' '$(DESTDIR)$(bindir)/millm-bridge'

# --- Tests in C ---------------------------------------------------------------------------------
# ThreadSanitizer knows nothing of the emulated device's fibers, of which there is one thread
UNIT_TESTS = $(patsubst test/unit/%.c,$(BUILD)/test/%,$(filter-out $(if $(filter thread,$(SAN)),%/test_cuda.c),$(wildcard test/unit/test_*.c)))
DRIVERS    = $(patsubst test/parity/%.c,$(BUILD)/%,$(wildcard test/parity/*.c))
unit-programs: $(UNIT_TESTS)
drivers: $(DRIVERS)
$(BUILD)/test/%: test/unit/%.c $(LIB)
	@mkdir -p $(@D)
	$(Q)$(CC) $(ENGINE_CFLAGS) -Itest/unit -MMD -MP -MF $@.d -o $@ $(filter %.c %.o,$^) $(LIB) -lcmocka $(ENGINE_LIBS)
# the bridge's parser, which is in no library
$(BUILD)/test/test_http: $(BUILD)/src/bridge/http_parse.o
# AVX-512 apart from the test itself, which must be able to say that this CPU lacks it
$(BUILD)/test/test_amx: $(BUILD)/test/amx_emulated.o
$(BUILD)/test/amx_emulated.o: test/unit/amx_emulated.c
	@mkdir -p $(@D)
	$(Q)$(CC) $(ENGINE_CFLAGS) -O3 $(AVX512_ISA) -MMD -MP -c -o $@ $<
$(BUILD)/test/test_cuda: $(EMULATED)
$(BUILD)/test/test_cuda: ENGINE_CFLAGS += -Icuda -Itest/cuda -DMILLM_CUDA_EMULATED
$(BUILD)/test/test_cuda: | $(BUILD)/emulated/driver/libcublasLt.so.13
$(BUILD)/test/test_device: | emulated
$(DRIVERS): $(BUILD)/%: test/parity/%.c $(LIB)
	$(Q)$(CC) $(ENGINE_CFLAGS) -MMD -MP -MF $@.d -o $@ $< $(LIB) $(ENGINE_LIBS)
unit: $(UNIT_TESTS)
	@dev/run-unit $(UNIT_TESTS)

# Fuzz targets are clang's; everything that they reach is instrumented.
FUZZ_SECONDS ?= 20
FUZZ_TARGETS  = $(patsubst test/fuzz/%.c,build/fuzz/%,$(wildcard test/fuzz/fuzz_*.c))
FUZZ_BRIDGE   = build/fuzz/src/bridge/http_parse.o
fuzz-lib:
	@$(MAKE) --no-print-directory BUILD=build/fuzz CC=clang SAN=fuzzer-no-link,address,undefined build/fuzz/libmillm.a $(FUZZ_BRIDGE)
build/fuzz/fuzz_%: test/fuzz/fuzz_%.c fuzz-lib
	$(Q)clang $(filter-out -fsanitize%,$(ENGINE_CFLAGS)) -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=all \
		-o $@ $< $(FUZZ_BRIDGE) build/fuzz/libmillm.a $(ENGINE_LIBS)
fuzz-programs: $(FUZZ_TARGETS)
fuzz: $(FUZZ_TARGETS)
	@dev/run-fuzz $(FUZZ_SECONDS) $(FUZZ_TARGETS)

lint:
	@dev/lint

.PHONY: emulated cuda-report programs unit unit-programs drivers fuzz fuzz-lib fuzz-programs lint install-helpers uninstall-helpers
-include $(shell find $(BUILD)/src $(BUILD)/module $(BUILD)/test $(BUILD)/cuda $(BUILD)/emulated -name '*.d' 2>/dev/null)
endif
