# What people and CI do here; `make help` lists it.

CARGO ?= cargo
# Exported, so that the programs below find each other in the same directories.
export CARGO_TERM_COLOR ?= auto
export RUST_BACKTRACE ?= 0

NEXTEST := $(shell $(CARGO) nextest --version >/dev/null 2>&1 && echo yes)

# One run of everything, whose closing summary is the result.
ifeq ($(NEXTEST),yes)
TEST := $(CARGO) nextest run --workspace --locked --no-fail-fast
BUILD_TESTS := $(CARGO) nextest run --workspace --locked --no-run
IGNORED := --run-ignored only
else
TEST := $(CARGO) test --workspace --locked --no-fail-fast
BUILD_TESTS := $(CARGO) test --workspace --locked --no-run
IGNORED := -- --ignored
endif
CLASSES := $(CARGO) run --quiet --locked -p tests --bin classes --

SECONDS ?= 60
H ?= 1
# What is fuzzed; a virtio model is a target by its name.
FUZZED := block/image block/check block/nbd virtio/pci virtio/ring \
	virtio/balloon virtio/blk virtio/console virtio/fs virtio/input virtio/mem virtio/net \
	virtio/rng virtio/vhost-user-blk virtio/vhost-user-net virtio/vsock \
	devices/rfb devices/ports api/http api/websocket migration/snapshot migration/stream

.PHONY: fuzz fuzz-programs sbom soak coverage help run build guests setup setup-full test test-programs test-full test-openapi \
	openapi unsafe-list bench lint web-packages clean

help:
	@echo 'make run        boot a Debian kernel to a shell; without a terminal, show the guest and power off'
	@echo 'make test       unit tests, small guests, bad input, stock kernels (minutes)'
	@echo 'make test-full  the long cases, after make test'
	@echo 'make test-openapi  requests of all kinds against the control socket; gets Python packages'
	@echo 'make openapi    write the OpenAPI document anew, after a change of the wire types'
	@echo 'make unsafe-list  write the page of unsafe code anew, resources/supply/unsafe.md'
	@echo 'make web-packages  get the npm packages of the web console anew, as resources/web/packages.txt names them'
	@echo 'make bench      measure against QEMU'
	@echo 'make fuzz       any bytes as images, guests and viewers, for SECONDS=60 each'
	@echo 'make soak       machines that everything is done to again and again, for H=1 hours'
	@echo 'make coverage   how much of what guests, images and peers reach is run by the tests'
	@echo 'make sbom       what the program is made of, as CycloneDX: target/sbom.json'
	@echo 'make lint       formatting, clippy, dependencies'
	@echo 'make build      the vireo program, optimized: target/release/vireo'
	@echo 'make guests     the small guest programs: target/guests'
	@echo 'make setup      get what the machine lacks; the others do it themselves'
	@echo 'make clean      remove target/ with all that was built and unpacked'
	@echo
	@echo 'TESTBED_ONLY=TEXT make test    the guests alone whose case holds TEXT'
	@echo 'TESTBED_GROUND=nested          not on the own /dev/kvm; or direct'
	@echo 'VIREO=PATH                     another build of the program'

fuzz: fuzz-programs
	@tests/fuzz $(SECONDS) $(FUZZED)

fuzz-programs:
	@tests/setup --fuzz
	@tests/fuzz --build $(FUZZED)

setup:
	@tests/setup

setup-full:
	@tests/setup --generic

# The machine's only user may be a fresh one, whose first need is the compiler.
build: setup
	@$(CARGO) build --release --locked -p vmm

guests: setup
	@$(MAKE) --no-print-directory -s -C resources/guests

run: build
	@$(CARGO) build --quiet --locked -p tests --bins
	@$(CARGO) run --quiet --locked -p tests --bin nested-run

# What the tests consist of.
test-programs: setup
	@$(BUILD_TESTS)
	@$(CARGO) build --quiet --locked -p tests --bins

# A class of tests that ran nowhere is a failure too. The last step of the optimized program keeps one
# processor busy for minutes, so the others build the tests meanwhile.
test: setup guests
	@$(MAKE) --no-print-directory -j2 build test-programs
	@$(CLASSES) forget
	@result=0; $(TEST) || result=1; $(CLASSES) check || result=1; exit $$result

test-full: setup-full build guests
	@$(CARGO) build --quiet --locked -p tests --bins
	@result=0; $(TEST) $(IGNORED) || result=1; $(CLASSES) check full || result=1; exit $$result

test-openapi: build guests
	@tests/openapi/run

unsafe-list: setup
	@WRITE_UNSAFE_LIST=1 $(CARGO) test --quiet --locked -p tests --test tidy every_exception

openapi:
	@VIREO_WRITE_OPENAPI=1 $(CARGO) test --quiet --locked -p api the_document_in_the_repository

web-packages:
	@resources/web/refresh

sbom: setup
	@$(CARGO) run --locked --quiet -p tests --bin sbom > target/sbom.json
	@echo 'wrote target/sbom.json'

soak: build guests
	@$(CARGO) run --release --locked -p tests --bin soak -- $(H)

coverage: setup guests
	@tests/coverage

bench: build guests
	@$(CARGO) run --release --locked -p tests --bin bench

lint: setup
	$(CARGO) fmt --all -- --check
	@# Modules that a macro declares are not found from their crate.
	$(CARGO) fmt --package virtio -- --check $$(find virtio/src/models -name '*.rs')
	$(CARGO) fmt --manifest-path block/fuzz/Cargo.toml -- --check
	$(CARGO) fmt --manifest-path virtio/fuzz/Cargo.toml -- --check
	$(CARGO) fmt --manifest-path devices/fuzz/Cargo.toml -- --check
	$(CARGO) fmt --manifest-path api/fuzz/Cargo.toml -- --check
	$(CARGO) fmt --manifest-path migration/fuzz/Cargo.toml -- --check
	$(CARGO) clippy --workspace --all-targets --locked -- -D warnings
	@if $(CARGO) deny --version >/dev/null 2>&1; then \
		$(CARGO) deny --offline check licenses bans sources; \
	else \
		echo 'lint: skipped cargo deny, which is not installed (cargo install cargo-deny, 8 minutes)'; \
	fi

clean:
	$(CARGO) clean
