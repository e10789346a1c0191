/*
 * emulated.cc -- threads of a block as fibers of one thread, and the runtime's functions over malloc().
 *
 * A fiber is a stack and what its registers were.  The scheduler, on the stack of whoever launches, gives each its turn; a fiber
 * gives it back where it waits.  A warp goes on when all of its 32 wait for the warp, a block when all that have not returned wait for the block.
 */
#include "emulated.h"

#include <cstdio>
#include <cstdlib>
#include <sys/mman.h>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif

#define MAX_THREADS 1024
#define WARP 32
#define STACK_BYTES (128 << 10)
#define SHARED_BYTES (48 << 10)	/* what a block has without asking */
#define MOST_SHARED_BYTES (96 << 10)	/* and with it, of the devices that have least, 99 KB, but for what a kernel declares */
#define MULTIPROCESSORS 3

MillmEmulated millm_emulated = {(size_t) 8 << 30, 0, 0, 0, 0, 0, (size_t) 1 << 30, -1, -1, 9, 0, 0};

/* In a module that is opened: what its process was told. */
static const bool is_told = [] {
	if (const char *calls = getenv("EMULATED_CALLS_LEFT"))
		millm_emulated.calls_left = atoi(calls);
	return true;
}();
EmulatedPlace emulated_place;
dim3		emulated_block_size, emulated_grid_size;

enum State {READY, AT_WARP, AT_BLOCK, DONE};

/* To shared memory, on their way */
struct Copy16
{
	void	   *to;
	const void *from;			/* NULL: zeros */
};

struct Fiber
{
	void	   *sp;
	char	   *stack;
	State		state;
	int			turn;			/* of the two places that it brings its values to */
	float		brought[2];
	size_t		shared_used;
	bool		is_after;		/* it has called after_previous() */
	int			n_copies;
	Copy16		copies[64];
};

static Fiber fibers[MAX_THREADS];
static Fiber *current;
static void *scheduler_sp;
static void (*thread_function) (void *arg);
static void *thread_arg;
static bool overlaps_now;		/* the kernel that runs */
alignas(64) static char shared_memory[SHARED_BYTES];
alignas(64) static char launched_memory[MOST_SHARED_BYTES];
static size_t launched_bytes;	/* of it, that the launch has */

[[noreturn]] void
emulated_complain(const char *what)
{
	fprintf(stderr, "emulated device: %s (thread %u of block %u, %u)\n", what, emulated_place.thread.x, emulated_place.block.x, emulated_place.block.y);
	abort();
}

/* Save this stack's registers, leave its pointer at *from, go on with `to`. */
extern "C" void emulated_switch(void **from, void *to);
asm(R"(
	.text
	.globl emulated_switch
	.type emulated_switch, @function
emulated_switch:
	pushq %rbp
	pushq %rbx
	pushq %r12
	pushq %r13
	pushq %r14
	pushq %r15
	movq %rsp, (%rdi)
	movq %rsi, %rsp
	popq %r15
	popq %r14
	popq %r13
	popq %r12
	popq %rbx
	popq %rbp
	ret
	.size emulated_switch, .-emulated_switch
)");

#ifdef __SANITIZE_ADDRESS__
static void *scheduler_fake;
static const void *scheduler_bottom;
static size_t scheduler_size;
#endif

static void
wait_as(State state)
{
	current->state = state;
#ifdef __SANITIZE_ADDRESS__
	void	   *fake;

	__sanitizer_start_switch_fiber(state == DONE ? NULL : &fake, scheduler_bottom, scheduler_size);
#endif
	emulated_switch(&current->sp, scheduler_sp);
#ifdef __SANITIZE_ADDRESS__
	__sanitizer_finish_switch_fiber(fake, &scheduler_bottom, &scheduler_size);
#endif
}

static void
fiber_main()
{
#ifdef __SANITIZE_ADDRESS__
	__sanitizer_finish_switch_fiber(NULL, &scheduler_bottom, &scheduler_size);
#endif
	thread_function(thread_arg);
	if (overlaps_now && !current->is_after)
		emulated_complain("a thread of a kernel that may begin early returns without after_previous()");
	if (current->n_copies > 0)
		emulated_complain("a thread returns before its copies are there");
	wait_as(DONE);
	emulated_complain("a thread that has returned runs again");
}

static void
begin_fiber(Fiber *f)
{
	void	  **top;

	if (!f->stack)
	{
		f->stack = (char *) mmap(NULL, STACK_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
		if (f->stack == MAP_FAILED)
			emulated_complain("no memory for a stack");
	}
	top = (void **) (f->stack + STACK_BYTES);
	*--top = NULL;				/* aligns the stack as a call does */
	*--top = (void *) fiber_main;
	f->sp = top - 6;			/* six registers, of any value */
	f->state = READY;
	f->shared_used = 0;
	f->turn = 0;
	f->is_after = false;
}

static void
run_fiber(int i)
{
	current = &fibers[i];
	emulated_place.thread = dim3((unsigned) i, 0, 0);
#ifdef __SANITIZE_ADDRESS__
	__sanitizer_start_switch_fiber(&scheduler_fake, current->stack, STACK_BYTES);
#endif
	emulated_switch(&scheduler_sp, current->sp);
#ifdef __SANITIZE_ADDRESS__
	__sanitizer_finish_switch_fiber(scheduler_fake, NULL, NULL);
#endif
}

/* Until all of a warp wait for the block or have returned. */
static void
run_warp(int first, int n)
{
	for (;;)
	{
		int			n_at_warp = 0;

		for (int k = 0; k < n; k++)
		{
			const int	i = first + (millm_emulated.backwards ? n - 1 - k : k);

			if (fibers[i].state == READY)
				run_fiber(i);
			n_at_warp += fibers[i].state == AT_WARP;
		}
		if (n_at_warp == 0)
			return;
		if (n_at_warp < WARP)
			emulated_complain("a shuffle of the whole warp that not all of its lanes reach");
		for (int i = first; i < first + n; i++)
			fibers[i].state = READY;
	}
}

static void
run_block(int n_threads)
{
	int			n_waiting;

	memset(shared_memory, 0xff, sizeof(shared_memory));	/* NaN */
	memset(launched_memory, 0xff, launched_bytes);
	for (int i = 0; i < n_threads; i++)
		begin_fiber(&fibers[i]);
	do
	{
		n_waiting = 0;
		for (int k = 0; k < n_threads; k += WARP)
			run_warp(millm_emulated.backwards ? n_threads - WARP - k : k, WARP);
		for (int i = 0; i < n_threads; i++)
			if (fibers[i].state == AT_BLOCK)
			{
				fibers[i].state = READY;
				n_waiting++;
			}
		if (n_waiting != 0 && n_waiting != n_threads)
			emulated_complain("__syncthreads() after a thread of the block has returned");
	} while (n_waiting > 0);
}

void *
emulated_launched_shared(size_t bytes)
{
	if (bytes > launched_bytes)
		emulated_complain("a kernel that wants more shared memory than its launch brings");
	return launched_memory;
}

void *
emulated_shared(size_t bytes)
{
	char	   *p = shared_memory + current->shared_used;

	current->shared_used += (bytes + 31) / 32 * 32;
	if (current->shared_used > SHARED_BYTES)
		emulated_complain("too much shared memory");
	return p;
}

bool
emulated_warp()
{
	wait_as(AT_WARP);
	return (current - fibers) % WARP == 0;
}

void
after_previous()
{
	current->is_after = true;
}

/* As late as they can be: a kernel that does not wait for them finds what was there before. */
void
copy_16(void *to, const void *from, bool is_there)
{
	if ((uintptr_t) to % 16 != 0 || (uintptr_t) from % 16 != 0)
		emulated_complain("a copy of 16 bytes that is not aligned");
	if (current->n_copies == (int) (sizeof(current->copies) / sizeof(current->copies[0])))
		emulated_complain("more copies of a thread than the emulation remembers");
	current->copies[current->n_copies++] = {to, is_there ? from : nullptr};
}

void
wait_for_copies()
{
	for (int i = 0; i < current->n_copies; i++)
		if (current->copies[i].from)
			memcpy(current->copies[i].to, current->copies[i].from, 16);
		else
			memset(current->copies[i].to, 0, 16);
	current->n_copies = 0;
}

void
__syncthreads()
{
	wait_as(AT_BLOCK);
}

float
__shfl_xor_sync(unsigned mask, float v, int by)
{
	return __shfl_sync(mask, v, (int) (current - fibers) % WARP ^ by);
}

float
__shfl_sync(unsigned mask, float v, int lane)
{
	const Fiber *other = &fibers[(current - fibers) / WARP * WARP + lane];
	const int	turn = current->turn;

	if (mask != 0xffffffffu)
		emulated_complain("a shuffle of a part of the warp");
	current->brought[turn] = v;
	current->turn = 1 - turn;	/* who is ahead by one does not overwrite what others still read */
	wait_as(AT_WARP);
	return other->brought[turn];
}

/* ---- the runtime ---- */

static cudaError_t last_error = cudaSuccess;

static cudaError_t
say(cudaError_t error)
{
	if (error != cudaSuccess)
		last_error = error;
	return error;
}

/* What a call says, of an emulated device that may be broken. */
static cudaError_t
answer()
{
	if (millm_emulated.calls_left < 0)
		return cudaSuccess;
	if (millm_emulated.calls_left == 0)
		return say(cudaErrorIllegalAddress);
	millm_emulated.calls_left--;
	return cudaSuccess;
}

/* Copies from pinned memory that have been queued and not been made yet, oldest first. */
struct Copy
{
	void	   *to;
	const void *from;
	size_t		bytes;
};
#define MAX_COPIES 256
static Copy copies[MAX_COPIES];
static long n_queued, n_made;	/* since the beginning */

static void
make_copies(long until)
{
	for (; n_made < until; n_made++)
		memcpy(copies[n_made % MAX_COPIES].to, copies[n_made % MAX_COPIES].from, copies[n_made % MAX_COPIES].bytes);
}

/* Copies to pinned memory, which are there when the stream was waited for, and as the device's memory was when they were queued */
struct Arrival
{
	void	   *to;
	void	   *bytes;
	size_t		n;
	Arrival    *next;
};
static Arrival *arrivals;

static void
arrive()
{
	for (Arrival *a = arrivals, *next; a; a = next)
	{
		next = a->next;
		memcpy(a->to, a->bytes, a->n);
		free(a->bytes);
		free(a);
	}
	arrivals = NULL;
}

struct Pinned
{
	char	   *p;
	size_t		bytes;
};
static Pinned pinned[64];

static bool
is_pinned(const void *p)
{
	for (Pinned &known : pinned)
		if ((const char *) p >= known.p && (const char *) p < known.p + known.bytes)
			return true;
	return false;
}

/* What is captured: launches, nothing else. */
struct Captured
{
	const void *kernel;
	void		(*thread) (void *arg);
	dim3		blocks;
	int			n_threads;
	size_t		shared;
	bool		overlaps;
	Captured   *next;
	alignas(16) char arg[1024];
};

struct CUgraph_st
{
	Captured   *first,
			   *last;
};
static cudaGraph_t capturing;

static void
not_captured(const char *call)
{
	if (capturing)
	{
		fprintf(stderr, "emulated device: %s while launches are captured\n", call);
		abort();
	}
}

/* What a launch of a kernel can bring of shared memory */
static size_t &
limit_of(const void *kernel)
{
	static struct
	{
		const void *kernel;
		size_t		bytes;
	}			limits[256];

	for (auto &limit : limits)
		if (limit.kernel == kernel || !limit.kernel)
		{
			if (!limit.kernel)
				limit = {kernel, SHARED_BYTES};
			return limit.bytes;
		}
	emulated_complain("more kernels than are remembered");
}

cudaError_t
emulated_run(const void *kernel, void (*thread) (void *arg), void *arg, size_t arg_bytes, dim3 blocks, int n_threads, size_t shared,
			 bool overlaps)
{
	if (capturing)
	{
		Captured   *launch = (Captured *) calloc(1, sizeof(*launch));

		if (!launch || arg_bytes > sizeof(launch->arg))
			emulated_complain("a launch that is too large to be captured");
		launch->kernel = kernel;
		launch->thread = thread;
		launch->blocks = blocks;
		launch->n_threads = n_threads;
		launch->shared = shared;
		launch->overlaps = overlaps;
		memcpy(launch->arg, arg, arg_bytes);
		*(capturing->last ? &capturing->last->next : &capturing->first) = launch;
		capturing->last = launch;
		return cudaSuccess;
	}
	make_copies(n_queued);
	if (answer() != cudaSuccess || last_error != cudaSuccess)
		return cudaGetLastError();
	if (blocks.x == 0 || blocks.y == 0 || blocks.x > 0x7fffffff || blocks.y > 65535 || n_threads < 1 || n_threads > MAX_THREADS)
		return say(cudaErrorInvalidValue);
	if (n_threads % WARP != 0)
		emulated_complain("a block that is not of whole warps");
	if (shared > limit_of(kernel))
		return say(cudaErrorInvalidValue);
	launched_bytes = shared;
	thread_function = thread;
	thread_arg = arg;
	overlaps_now = overlaps;
	millm_emulated.n_overlapping += overlaps;
	emulated_block_size = dim3((unsigned) n_threads);
	emulated_grid_size = blocks;
	for (unsigned y = 0; y < blocks.y; y++)
		for (unsigned x = 0; x < blocks.x; x++)
		{
			emulated_place.block = dim3(x, y, 0);
			run_block(n_threads);
		}
	return cudaSuccess;
}

cudaError_t
cudaSetDevice(int)
{
	return answer();
}

cudaError_t
cudaGetDevice(int *device)
{
	*device = 0;
	return answer();
}

cudaError_t
cudaDeviceGetAttribute(int *value, cudaDeviceAttr, int)
{
	*value = MULTIPROCESSORS;
	return answer();
}

cudaError_t
cudaFuncSetAttribute(const void *kernel, cudaFuncAttribute, int value)
{
	if (value < 0 || value > MOST_SHARED_BYTES)
		return say(cudaErrorInvalidValue);
	limit_of(kernel) = (size_t) value;
	return answer();
}

cudaError_t
cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *n, const void *, int, size_t)
{
	*n = 1;
	return answer();
}

cudaError_t
cudaFuncGetAttributes(cudaFuncAttributes *attributes, const void *)
{
	attributes->ptxVersion = millm_emulated.capability * 10;
	return answer();
}

cudaError_t
cudaMemGetInfo(size_t *free_bytes, size_t *total_bytes)
{
	*free_bytes = millm_emulated.total_bytes - millm_emulated.used_bytes;
	*total_bytes = millm_emulated.total_bytes;
	return answer();
}

cudaError_t
cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned)
{
	if (answer() != cudaSuccess)
		return last_error;
	*stream = (cudaStream_t) &millm_emulated;
	millm_emulated.n_host++;
	return cudaSuccess;
}

cudaError_t
cudaStreamDestroy(cudaStream_t)
{
	make_copies(n_queued);
	millm_emulated.n_host--;
	return answer();
}

cudaError_t
cudaStreamSynchronize(cudaStream_t)
{
	not_captured("cudaStreamSynchronize");
	make_copies(n_queued);
	arrive();
	return answer();
}

/* Before the memory, which begins at a multiple of 256 as the device's does. */
struct Head
{
	size_t		bytes;
	Head	   *next;
};
#define HEAD 256
#define FENCE 4096				/* bytes behind an allocation, which must be as they were */
#define FENCE_BYTE 0xa5
static Head *allocations;

cudaError_t
cudaMalloc(void **p, size_t bytes)
{
	not_captured("cudaMalloc");
	Head	   *head;

	*p = NULL;
	if (answer() != cudaSuccess)
		return last_error;
	if (millm_emulated.allocations_left == 0 || bytes > millm_emulated.total_bytes - millm_emulated.used_bytes)
		return say(cudaErrorMemoryAllocation);
	if (millm_emulated.allocations_left > 0)
		millm_emulated.allocations_left--;
	if (posix_memalign((void **) &head, HEAD, HEAD + bytes + FENCE) != 0)
		emulated_complain("no memory for the device's");
	*head = {bytes, allocations};
	allocations = head;
	memset((char *) head + HEAD, 0xff, bytes);
	memset((char *) head + HEAD + bytes, FENCE_BYTE, FENCE);
	millm_emulated.used_bytes += bytes;
	millm_emulated.n_allocations++;
	*p = (char *) head + HEAD;
	return cudaSuccess;
}

cudaError_t
cudaFree(void *p)
{
	not_captured("cudaFree");
	Head	  **link = &allocations;
	Head	   *head;

	if (!p)
		return cudaSuccess;
	head = (Head *) ((char *) p - HEAD);
	make_copies(n_queued);
	while (*link != head)
		if (*link)
			link = &(*link)->next;
		else
			emulated_complain("memory is freed that was not allocated");
	*link = head->next;
	for (int i = 0; i < FENCE; i++)
		if (((const unsigned char *) p)[head->bytes + (size_t) i] != FENCE_BYTE)
			emulated_complain("a kernel has written behind its memory");
	millm_emulated.used_bytes -= head->bytes;
	millm_emulated.n_allocations--;
	free(head);
	return answer();
}

int
millm_emulated_is_clear(void)
{
	make_copies(n_queued);
	for (const Head *head = allocations; head; head = head->next)
		for (size_t i = 0; i < head->bytes; i++)
			if (((const char *) head)[HEAD + i] != 0)
				return 0;
	return 1;
}

cudaError_t
cudaMallocHost(void **p, size_t bytes)
{
	not_captured("cudaMallocHost");
	*p = NULL;
	if (answer() != cudaSuccess)
		return last_error;
	if (millm_emulated.allocations_left == 0 || bytes > millm_emulated.pinned_limit)
		return say(cudaErrorMemoryAllocation);
	if (millm_emulated.allocations_left > 0)
		millm_emulated.allocations_left--;
	for (Pinned &place : pinned)
		if (!place.p)
		{
			place = {(char *) malloc(bytes), bytes};
			memset(place.p, 0xff, bytes);
			*p = place.p;
			millm_emulated.n_host++;
			return cudaSuccess;
		}
	emulated_complain("more pinned allocations than the emulation counts");
}

cudaError_t
cudaFreeHost(void *p)
{
	not_captured("cudaFreeHost");
	if (!p)
		return cudaSuccess;
	arrive();
	for (Pinned &place : pinned)
		if (place.p == p)
		{
			for (long i = n_made; i < n_queued; i++)
				if ((const char *) copies[i % MAX_COPIES].from >= place.p && (const char *) copies[i % MAX_COPIES].from < place.p + place.bytes)
					emulated_complain("page-locked memory is freed that a copy still reads");
			place = {NULL, 0};
		}
	free(p);
	millm_emulated.n_host--;
	return answer();
}

/* What was queued before it. */
struct CUevent_st
{
	long		until;
};

cudaError_t
cudaEventCreateWithFlags(cudaEvent_t *event, unsigned)
{
	if (answer() != cudaSuccess)
		return last_error;
	*event = (cudaEvent_t) calloc(1, sizeof(CUevent_st));
	millm_emulated.n_host++;
	return cudaSuccess;
}

cudaError_t
cudaEventDestroy(cudaEvent_t event)
{
	free(event);
	millm_emulated.n_host--;
	return answer();
}

cudaError_t
cudaEventRecord(cudaEvent_t event, cudaStream_t)
{
	event->until = n_queued;
	return answer();
}

cudaError_t
cudaEventSynchronize(cudaEvent_t event)
{
	make_copies(event->until);
	return answer();
}

cudaError_t
cudaMemsetAsync(void *p, int value, size_t bytes, cudaStream_t)
{
	not_captured("cudaMemsetAsync");
	make_copies(n_queued);
	memset(p, value, bytes);
	return answer();
}

cudaError_t
cudaMemcpyAsync(void *to, const void *from, size_t bytes, cudaMemcpyKind kind, cudaStream_t)
{
	not_captured("cudaMemcpyAsync");
	millm_emulated.bytes_to_host += kind == cudaMemcpyDeviceToHost ? bytes : 0;
	if (kind == cudaMemcpyHostToDevice && is_pinned(from))
	{
		make_copies(n_queued - MAX_COPIES + 1);
		copies[n_queued++ % MAX_COPIES] = {to, from, bytes};
		return answer();
	}
	make_copies(n_queued);
	if (kind == cudaMemcpyDeviceToHost && is_pinned(to))
	{
		Arrival   **link = &arrivals;

		while (*link)
			link = &(*link)->next;
		*link = (Arrival *) calloc(1, sizeof(Arrival));
		**link = {to, malloc(bytes), bytes, NULL};
		memcpy((*link)->bytes, from, bytes);
		return answer();
	}
	memcpy(to, from, bytes);
	return answer();
}

cudaError_t
cudaMemcpy2DAsync(void *to, size_t to_pitch, const void *from, size_t from_pitch, size_t width, size_t height, cudaMemcpyKind kind, cudaStream_t)
{
	not_captured("cudaMemcpy2DAsync");
	millm_emulated.bytes_to_host += kind == cudaMemcpyDeviceToHost ? width * height : 0;
	make_copies(n_queued);
	for (size_t i = 0; i < height; i++)
		memcpy((char *) to + i * to_pitch, (const char *) from + i * from_pitch, width);
	return answer();
}

cudaError_t
cudaHostRegister(void *, size_t, unsigned)
{
	const cudaError_t status = answer();

	millm_emulated.n_host += status == cudaSuccess;
	return status;
}

cudaError_t
cudaHostUnregister(void *)
{
	millm_emulated.n_host--;
	return answer();
}

cudaError_t
cudaGetLastError()
{
	const cudaError_t error = last_error;

	last_error = cudaSuccess;
	return error;
}

cudaError_t
cudaStreamBeginCapture(cudaStream_t, cudaStreamCaptureMode)
{
	not_captured("a second capture");
	capturing = (cudaGraph_t) calloc(1, sizeof(*capturing));
	return answer();
}

cudaError_t
cudaStreamEndCapture(cudaStream_t, cudaGraph_t *graph)
{
	*graph = capturing;
	capturing = NULL;
	return answer();
}

cudaError_t
cudaGraphDestroy(cudaGraph_t graph)
{
	for (Captured *launch = graph->first, *next; launch; launch = next)
	{
		next = launch->next;
		free(launch);
	}
	free(graph);
	return answer();
}

/* An executable graph is a graph that has taken the launches of another. */
cudaError_t
cudaGraphInstantiate(cudaGraphExec_t *exec, cudaGraph_t graph, unsigned long long)
{
	cudaGraph_t made = (cudaGraph_t) malloc(sizeof(*made));

	if (millm_emulated.allocations_left == 0 || !made)
	{
		free(made);
		return say(cudaErrorMemoryAllocation);
	}
	*made = *graph;
	*graph = {NULL, NULL};
	*exec = (cudaGraphExec_t) made;
	millm_emulated.n_host++;
	return answer();
}

cudaError_t
cudaGraphExecDestroy(cudaGraphExec_t exec)
{
	millm_emulated.n_host--;
	return cudaGraphDestroy((cudaGraph_t) exec);
}

cudaError_t
cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t)
{
	not_captured("a graph");
	millm_emulated.n_graph_launches++;
	for (Captured *launch = ((cudaGraph_t) exec)->first; launch; launch = launch->next)
	{
		const cudaError_t status = emulated_run(launch->kernel, launch->thread, launch->arg, sizeof(launch->arg), launch->blocks, launch->n_threads,
												launch->shared, launch->overlaps);

		if (status != cudaSuccess)
			return status;
	}
	return answer();
}

const char *
cudaGetErrorName(cudaError_t error)
{
	return error == cudaSuccess ? "cudaSuccess" : error == cudaErrorMemoryAllocation ? "cudaErrorMemoryAllocation" :
		error == cudaErrorIllegalAddress ? "cudaErrorIllegalAddress" : "cudaErrorInvalidValue";
}

const char *
cudaGetErrorString(cudaError_t error)
{
	return error == cudaErrorIllegalAddress ? "an illegal memory access was encountered" : cudaGetErrorName(error);
}
