/* An engine that knows the truth: OpenAI's chat stream over HTTP/1.1, one epoll loop, tokens on an exact timetable.
 *
 *   token_stub PORT TTFT_US ITL_US      (both 0: the whole answer at once)
 *
 * Every token's text is " t" and 19 digits: CLOCK_MONOTONIC in nanoseconds just before it is sent. One HTTP chunk and
 * one send per token. max_tokens (or max_completion_tokens) of the request says how many. Prints "ready" when it listens. For one test machine:
 * requests must be well-formed, and running out of memory ends the program.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define MAX_FD 70000
typedef struct {
    int fd, at, wanted, sent, place; /* place: in the heap, -1 outside */
    int64_t due;
    char in[65536];
    char *out;
    size_t out_len, out_room;
} Link;
static Link *links[MAX_FD];
static Link *heap[MAX_FD];
static char waits[MAX_FD]; /* registered for writing */
static int heap_len, poller;
static int64_t ttft_ns, itl_ns;

static int64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000LL + t.tv_nsec;
}

static void swap(int a, int b) {
    Link *held = heap[a];
    heap[a] = heap[b], heap[b] = held;
    heap[a]->place = a, heap[b]->place = b;
}

static void settle(int at) {
    while (at > 0 && heap[(at - 1) / 2]->due > heap[at]->due) swap(at, (at - 1) / 2), at = (at - 1) / 2;
    for (;;) {
        int least = at;
        for (int child = 2 * at + 1; child <= 2 * at + 2; child++)
            if (child < heap_len && heap[child]->due < heap[least]->due) least = child;
        if (least == at) return;
        swap(at, least), at = least;
    }
}

static void leave(Link *l) {
    int at = l->place;
    if (at < 0) return;
    heap_len--;
    if (at < heap_len) {
        heap[at] = heap[heap_len], heap[at]->place = at;
        settle(at);
    }
    l->place = -1;
}

static void end(Link *l) {
    leave(l);
    links[l->fd] = NULL;
    close(l->fd);
    free(l->out);
    free(l);
}

static void put(Link *l, const char *data, size_t len) {
    if (l->out_len + len > l->out_room) {
        l->out_room = (l->out_len + len) * 2;
        if (!(l->out = realloc(l->out, l->out_room))) abort();
    }
    memcpy(l->out + l->out_len, data, len);
    l->out_len += len;
}

static int flush_out(Link *l) { /* 0: the peer has gone */
    size_t gone = 0;
    while (gone < l->out_len) {
        ssize_t n = send(l->fd, l->out + gone, l->out_len - gone, MSG_NOSIGNAL);
        if (n < 0 && errno != EAGAIN) return 0;
        if (n < 0) break;
        gone += (size_t)n;
    }
    int was_full = l->out_len > 0 && gone < l->out_len;
    memmove(l->out, l->out + gone, l->out_len - gone);
    l->out_len -= gone;
    struct epoll_event e = {.events = EPOLLIN | (was_full ? EPOLLOUT : 0), .data.fd = l->fd};
    if (waits[l->fd] != was_full) epoll_ctl(poller, EPOLL_CTL_MOD, l->fd, &e), waits[l->fd] = (char)was_full;
    return 1;
}

static void event(Link *l, const char *choices, const char *rest) {
    char body[768], head[16];
    int n = snprintf(body, sizeof body,
                     "data: {\"id\":\"chatcmpl-0f1e2d3c4b5a69788796a5b4c3d2e1f0\",\"object\":\"chat.completion.chunk\","
                     "\"created\":1700000000,\"model\":\"stub\",\"choices\":[%s]%s}\n\n", choices, rest);
    put(l, head, (size_t)snprintf(head, sizeof head, "%x\r\n", n));
    put(l, body, (size_t)n);
    put(l, "\r\n", 2);
}

static void token(Link *l) {
    char choice[256];
    int is_last = ++l->sent >= l->wanted;
    snprintf(choice, sizeof choice,
             "{\"index\":0,\"delta\":{\"content\":\" t%019lld\"},\"logprobs\":null,\"finish_reason\":%s}",
             (long long)now_ns(), is_last ? "\"length\"" : "null");
    event(l, choice, "");
    if (!is_last) return;
    char usage[128];
    snprintf(usage, sizeof usage, ",\"usage\":{\"prompt_tokens\":100,\"completion_tokens\":%d}", l->wanted);
    event(l, "", usage);
    const char *done = "e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n";
    put(l, done, strlen(done));
}

static int answer(Link *l) { /* 1: took a request; 0: none is whole yet */
    l->in[l->at] = 0;
    char *body = strstr(l->in, "\r\n\r\n");
    if (!body) return 0;
    char *length = strcasestr(l->in, "content-length:");
    long whole = body + 4 - l->in + (length && length < body ? atol(length + 15) : 0);
    if (l->at < whole) return 0;
    char *wanted = strstr(body, "\"max_tokens\":"), *newer = strstr(body, "\"max_completion_tokens\":");
    l->wanted = newer ? atoi(newer + 24) : wanted ? atoi(wanted + 13) : 1;
    l->sent = 0;
    const char *head = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
                       "transfer-encoding: chunked\r\n\r\n";
    put(l, head, strlen(head));
    event(l, "{\"index\":0,\"delta\":{\"role\":\"assistant\",\"content\":\"\"},\"finish_reason\":null}", "");
    memmove(l->in, l->in + whole, (size_t)(l->at - whole));
    l->at -= (int)whole;
    if (ttft_ns == 0 && itl_ns == 0) {
        while (l->sent < l->wanted) token(l);
    } else {
        l->due = now_ns() + ttft_ns;
        l->place = heap_len;
        heap[heap_len++] = l;
        settle(l->place);
    }
    return 1;
}

static void take(int listener) {
    int one = 1;
    for (int fd; (fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK)) >= 0;) {
        if (fd >= MAX_FD) { close(fd); continue; }
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
        Link *l = calloc(1, sizeof *l);
        if (!l) abort();
        l->fd = fd, l->place = -1;
        links[fd] = l, waits[fd] = 0;
        struct epoll_event e = {.events = EPOLLIN, .data.fd = fd};
        epoll_ctl(poller, EPOLL_CTL_ADD, fd, &e);
    }
}

static void hear(Link *l) {
    ssize_t n = recv(l->fd, l->in + l->at, sizeof l->in - 1 - (size_t)l->at, 0);
    if (n <= 0) {
        if (n == 0 || errno != EAGAIN) end(l);
        return;
    }
    l->at += (int)n;
    while (l->place < 0 && answer(l)) {}
    if (!flush_out(l)) end(l);
}

int main(int count, char **words) {
    if (count != 4) return 2;
    signal(SIGPIPE, SIG_IGN);
    struct rlimit files;
    getrlimit(RLIMIT_NOFILE, &files);
    files.rlim_cur = files.rlim_max;
    setrlimit(RLIMIT_NOFILE, &files);
    ttft_ns = atoll(words[2]) * 1000, itl_ns = atoll(words[3]) * 1000;
    int listener = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0), one = 1;
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons((uint16_t)atoi(words[1]))};
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    if (bind(listener, (void *)&address, sizeof address) || listen(listener, 8192)) return 1;
    poller = epoll_create1(0);
    struct epoll_event e = {.events = EPOLLIN, .data.fd = listener};
    epoll_ctl(poller, EPOLL_CTL_ADD, listener, &e);
    puts("ready");
    fflush(stdout);
    for (;;) {
        static struct epoll_event events[256];
        int64_t left = heap_len ? heap[0]->due - now_ns() : 1000000000;
        struct timespec wait = {left > 0 ? left / 1000000000 : 0, left > 0 ? left % 1000000000 : 0};
        int n = epoll_pwait2(poller, events, 256, &wait, NULL);
        for (int i = 0; i < n; i++) {
            int fd = events[i].data.fd;
            if (fd == listener) { take(listener); continue; }
            if (links[fd] && (events[i].events & EPOLLOUT) && !flush_out(links[fd])) end(links[fd]);
            if (links[fd] && (events[i].events & ~(uint32_t)EPOLLOUT)) hear(links[fd]);
        }
        for (int64_t t = now_ns(); heap_len && heap[0]->due <= t;) {
            Link *l = heap[0];
            token(l);
            if (l->sent >= l->wanted) leave(l);
            else l->due += itl_ns, settle(0);
            if (!flush_out(l)) end(l);
        }
    }
}
