// The first thing this program does is to call the metadata service: no C library,
// no shell, nothing before it. It prints the milliseconds until it was connected,
// and the first line and the length of the answer; exit code 0 only for a 200.
//
// Built with: gcc -static -nostdlib -O1 -o first first.c
typedef unsigned long u64;
typedef long i64;

static inline i64 call6(i64 n, i64 a, i64 b, i64 c, i64 d, i64 e, i64 f)
{
	i64 r;
#if defined(__x86_64__)
	register i64 r10 __asm__("r10") = d;
	register i64 r8 __asm__("r8") = e;
	register i64 r9 __asm__("r9") = f;
	__asm__ volatile("syscall" : "=a"(r) : "a"(n), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8), "r"(r9) : "rcx", "r11", "memory");
#else
#error "written for x86-64"
#endif
	return r;
}
#define call(n, a, b, c) call6(n, (i64)(a), (i64)(b), (i64)(c), 0, 0, 0)
enum { SYS_read = 0, SYS_write = 1, SYS_socket = 41, SYS_connect = 42, SYS_exit = 60, SYS_clock_gettime = 228 };

struct addr { unsigned short family, port; unsigned int ip; char zero[8]; };
struct ts { i64 s, ns; };

static const char request[] =
	"GET /metadata/instance/compute/name?api-version=2021-02-01&format=text HTTP/1.1\r\n"
	"Host: 169.254.169.254\r\nMetadata: true\r\nConnection: close\r\n\r\n";

static char buf[8192];

static void put(u64 n)
{
	char d[24];
	int i = 24;
	d[--i] = ' ';
	do {
		d[--i] = '0' + n % 10;
	} while (n /= 10);
	call(SYS_write, 1, d + i, 24 - i);
}

__attribute__((noreturn)) static void leave(int code)
{
	for (;;)
		call(SYS_exit, code, 0, 0);
}

__attribute__((force_align_arg_pointer)) void _start(void)
{
	// 169.254.169.254:80, network byte order.
	struct addr a = { 2, 0x5000, 0xfea9fea9, { 0 } };
	struct ts before, after;
	call(SYS_clock_gettime, 1, &before, 0);
	i64 fd = call(SYS_socket, 2, 1, 0);
	i64 err = call(SYS_connect, fd, &a, sizeof(a));
	call(SYS_clock_gettime, 1, &after, 0);
	put(((after.s - before.s) * 1000000000 + after.ns - before.ns) / 1000000);
	if (err < 0) {
		put(-err);
		call(SYS_write, 1, "connect failed\n", 15);
		leave(1);
	}
	call(SYS_write, fd, request, sizeof(request) - 1);
	i64 n = 0, got;
	while (n < (i64)sizeof(buf) && (got = call(SYS_read, fd, buf + n, sizeof(buf) - n)) > 0)
		n += got;
	i64 end = 0;
	while (end < n && buf[end] != '\r')
		end++;
	call(SYS_write, 1, buf, end);
	call(SYS_write, 1, "\n", 1);
	leave(n > 12 && buf[9] == '2' && buf[10] == '0' && buf[11] == '0' ? 0 : 1);
}
