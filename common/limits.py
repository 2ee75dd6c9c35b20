"""Every limit in one table: queue lengths, sizes, timeouts, retry caps. Units are the last word of each name.

A limit that a user may want to change is a default in `head/config.py` or `agent/config.py`; what stands
here is what the protocol and the safety of the daemons rest on.
"""

from __future__ import annotations

# names and documents
MODEL_NAME_CHARS = 192
NODE_ID_CHARS = 63
REVISION_CHARS = 64
LABELS_PER_NODE = 64
LABEL_CHARS = 128
METADATA_BYTES = 65_536
NESTING = 64  # levels of free-form data; what one stack decodes another must be able to encode
SOURCES_PER_MODEL = 16
MANIFEST_FILES = 4_096
MANIFEST_PATH_CHARS = 512
SOURCE_CHARS = 2_048
PINS_PER_COPY = 64
MODELS = 100_000
SERVICES = 10_000
REPLICAS_PER_SERVICE = 256
KEYS = 10_000
KEY_KEPT_MS = 7 * 86_400_000  # ended keys stay listed for so long

# jobs
STEPS_PER_JOB = 1_000
STEP_DEPENDENCIES = 256
JOBS_LIVE = 10_000
JOBS_KEPT = 100_000  # ended jobs beyond this are pruned, oldest first
STEPS_RUNNING_PER_NODE = 8
STEP_ATTEMPTS = 4
STEP_BACKOFF_BASE_MS = 1_000
STEP_BACKOFF_CAP_MS = 60_000
STEP_STALL_MS = 600_000  # a step without its own timeout fails when nothing moved for so long
STEP_BASE_MS = 1_800_000  # time without its own timeout: this, and its model's size at STEP_BYTES_PER_S
STEP_BYTES_PER_S = 2_000_000
STEP_STOP_MS = 300_000  # how long a cancelled step waits for its agent before it ends anyway
JOBS_PRUNED_PER_TICK = 200

# benchmarks
BENCHMARKS_LIVE = 16
BENCHMARKS_KEPT = 1_000  # ended ones beyond this are removed with their results, oldest first
BENCHMARK_POINTS_KEPT = 50_000  # of all benchmarks together; the oldest ended benchmarks beyond this go, too
POINT_FAILURES = 3  # failed points in a row after which a benchmark has failed
CLOCK_FRESH_MS = 15_000  # an older estimate of a node's clock is made anew before a start
RUNS_PER_NODE = 4  # load generators and monitors at the same time
RUN_PREPARE_MS = 300_000  # writing every prompt and opening connections
RUN_COLLECT_MS = 300_000  # from a run's end to its artifacts being with the head
RUN_LEAD_MS = 1_000  # from "all are armed" to the common start
RUN_ARMED_MS = 1_800_000  # an armed load generator that nobody fires ends after so long
RUN_STOP_GRACE_MS = 180_000  # beyond stop_after, before the agent kills a run that did not end by itself
RUN_UPLOAD_MS = 86_400_000  # artifacts are offered to a head that does not answer for so long
RUNS_KEPT = 16  # ended runs, and directories without a run, that an agent keeps until it is told to forget them
RUN_LOST_MS = 60_000  # a load node that is silent for so long has lost its part
JUDGE_S = 600.0  # merging a point's parts and writing its report
JUDGE_BYTES = 8_589_934_592  # address space of a process that does it
ARTIFACT_BYTES = 2_147_483_648  # one file of a run
ARTIFACTS_PER_RUN = 16
CLOCK_ASKS = 16  # questions of one estimate of a node's clock

# HTTP
BODY_BYTES = 1_048_576  # control plane; a larger body is 413 before it is read
GATEWAY_BODY_BYTES = 33_554_432  # prompts with images
GATEWAY_BODY_GRACE_S = 15.0  # for the beginning of a body, before its pace counts
GATEWAY_BODY_BYTES_PER_S = 16_384  # a slower sender is not waited for
GATEWAY_BODY_S = 120.0  # for a whole body, however steadily it comes
PAGE_ITEMS = 500
PAGE_ITEMS_DEFAULT = 100
WAIT_S = 3_600  # ?wait=
EVENT_BACKLOG = 10_000  # change-feed entries kept in memory for resume
EVENT_SUBSCRIBERS = 1_000
EVENT_SUBSCRIBER_QUEUE = 1_024  # a slower reader is closed and resumes from its last id
IDEMPOTENCY_KEYS = 100_000
IDEMPOTENCY_TTL_MS = 86_400_000
IDEMPOTENCY_KEY_CHARS = 128
YAML_BYTES = 524_288  # job files; PyYAML needs about 10 s of a thread for 1 MB
YAML_NODES = 100_000  # after aliases are expanded, which is what a bomb multiplies
BODY_READ_S = 30.0  # a whole control-plane body
HEADER_READ_S = 20.0  # for a connection's first request line and headers, and for a TLS handshake (setting)
KEEP_ALIVE_IDLE_S = (
    75.0  # for the next request on a connection (setting of the head); longer than usual proxies keep one
)
LINGER_S = 1.0  # how long the rest of a refused body is read and thrown away before the connection ends
SUBMIT_S = 30.0  # a change on its way to the disk; after it the outcome is unknown
STREAM_WRITE_S = 30.0  # a reader of events or logs that takes nothing for so long is closed
KEEP_ALIVE_S = 15.0  # comment lines in quiet event streams
AUTH_FAILURES_PER_MINUTE = 30  # per address; over it: 429
AUTH_ADDRESSES = 10_000  # addresses remembered for that
AUDIT_BYTES = 67_108_864  # per file of the audit log
AUDIT_FILES = 8  # kept besides the present one
AUDIT_QUEUE = 10_000  # lines on their way to the audit log

# sessions between head and agents
PROTOCOL = 1
PROTOCOL_MIN = 1
FRAME_BYTES = 2_097_152
TELEMETRY_BYTES = 65_536  # one node's readings, some 150 bytes for each GPU
OUTBOX_FRAMES = 256  # per agent; overflow closes the session, which is safe: state is level-triggered
OUTBOX_BYTES = 8_388_608
HELLO_TIMEOUT_S = 10.0
HELLO_RATE_PER_S = 1_500  # a hello costs the head 0.4 ms: 60 % of a core while all agents come back
INTERVAL_FLOOR_MS = 5_000
LEASES_PER_S = 2_000
LEASE_INTERVALS = 3  # lease = 3 x interval
SETTLE_MS = 60_000  # after a head start no node is judged lost before this
COMMAND_REPEAT_MS = 10_000
LOST_FRACTION_FREEZE = 0.55  # this share of nodes gone together freezes replacement
LOST_WINDOW_MS = 60_000  # losses this near to each other count as one event
LOST_PER_TICK = 1_000  # nodes judged lost in one turn; the rest follow a second later
FLAP_WINDOW_MS = 600_000  # a superseded agent process that returns within this is a second machine of one node id
FLAPS_ALARM = 2
NODES = 50_000
LOOP_STALL_MS = 1_000  # a longer stall of our own loop extends every lease by it
TICK_MS = 1_000

# journal
JOURNAL_BATCH_RECORDS = 512
JOURNAL_QUEUE_EVENTS = 10_000
HISTORY_RECORDS_KEPT = 500_000

# moving model bytes
CHUNK_BYTES_SMALL = 1_048_576  # model < 1 GiB
CHUNK_BYTES_MEDIUM = 4_194_304  # model < 16 GiB
CHUNK_BYTES_LARGE = 16_777_216
TICKET_TTL_MS = 6 * 3_600_000
CHECKPOINT_BYTES = 1_073_741_824
CHECKPOINT_S = 1.0
SOURCE_ATTEMPTS = 6
SOURCE_CONNECT_TIMEOUT_S = 10.0
SOURCE_READ_TIMEOUT_S = 60.0
CHUNK_STRIKES = 3  # bad chunks from one source before it is left alone for that blob
MOVER_CONNECTIONS = 64
READERS_PER_SERVING_NODE = 4  # fetches that may read from one node at the same time
PEERS_PER_FETCH = 2
ORIGIN_READERS_PER_MODEL = 2  # fetches of one model from its registered sources at the same time

# engines
LOG_BYTES_PER_REPLICA = 16_777_216
LOG_RUNS_KEPT = 3
REPLICA_READY_TIMEOUT_S = 900
REPLICA_STOP_GRACE_S = 10.0
DRAIN_MS = 30_000  # requests on their way may go on for so long when their engine is stopped (setting of the head)
REPLICA_BACKOFF_BASE_MS = 1_000
REPLICA_BACKOFF_CAP_MS = 300_000
REPLICA_PLACEMENTS = 6  # failed placements of a replica before it stays failed
REPLACE_STOP_AFTER_MS = 60_000  # replicas that may be replaced stop by themselves after so long without a head
REPLACE_MARGIN_MS = 30_000  # beyond lease, stop_after and grace, before an unreachable replica is replaced
SHIM_STOP_SLACK_MS = 5_000  # a shim ends its engine so long after its agent should have; far below the margin
PLACEMENT_RETRY_MS = 5_000
PLACEMENTS_PER_TICK = 50  # services that look again for a place in one turn
PLACEMENT_NODES_EXACT = 256  # with more nodes, samples of those with the model and of the others are compared
PLACEMENT_SAMPLE = 12  # places that fit and are compared, from each; the fullest of so many is rarely taken
CHECK_GRACE_MS = 15_000  # beyond its own timeout, before a health check that nobody answered has failed
CHECKS_LIVE = 10_000
PROBE_TIMEOUT_S = 5.0
PORT_RANGE = (20_000, 29_999)
REPLICA_STABLE_MS = 600_000  # ready for so long: earlier restarts are forgiven
REPLICA_KILL_REPEAT_MS = 2_000  # SIGKILL and the sweep are repeated until nothing is left
REPLICA_START_PROBE_MS = 250  # how often a starting engine is asked
CANARY_EVERY_PROBES = 6  # a ready engine generates one token at every so-manieth probe

# the agent's own
REPORT_SPACING_MS = 200  # status changes are gathered for so long before a report is sent; also between its pages
REPORT_PAGE_BYTES = 524_288  # a longer report goes in pages: what waits in the outbox stays far below its limit
REPORT_PAGES = 32  # of one report
PROGRESS_SPACING_MS = 500  # per copy
RESULT_REPEAT_MS = 10_000  # a result that was not acknowledged is said again
OUTCOMES_UNACKED = 10_000  # results beyond the fences; the oldest of more are given up
RESULTS_IN_FLIGHT = 64  # results said and not acknowledged; the others wait for their turn
OUTCOMES_KEPT = 10_000  # acknowledged outcomes kept as fences against late commands
AGENT_QUEUE_EVENTS = 10_000
COPIES_PER_NODE = 20_000
REPLICAS_PER_NODE = 512
CHECKS_PER_NODE = 256
LOG_FOLLOWERS = 64  # log requests of one node at a time
LOG_CHUNK_BYTES = 65_536
LOG_TAIL_LINES = 10_000
LOG_LINE_BYTES = 32_768  # a longer line comes in pieces
LOG_LINES_PER_CHUNK = 2_000
LOG_CREDIT_CHUNKS = 8  # pieces of one log on their way to a reader that has not taken them
LOG_SOURCES = 100  # logs that one view merges
LOG_STREAMS = 256  # logs that the head reads at the same time, over all nodes
LOG_STREAMS_PER_NODE = 48  # of those from one node; below LOG_FOLLOWERS
LOG_PATTERN_CHARS = 1_000
LOG_REGEX_PROCESSES = 16  # searches by regular expression of one daemon at a time
LOG_REGEX_S = 2.0  # for one piece of a log; a pattern that needs longer is refused
LOG_NODE_WAIT_S = 120.0  # how long a followed log waits for its node to come back
LOG_REORDER_MS = 700  # how long a line of a merged view waits for earlier ones of other logs
LOG_HELD_LINES = 20_000  # lines that wait so, of one view
LOG_SWEEP_S = 300.0  # how often old logs are removed
SLURM_LOG_DEPTH = 4  # folders below a log root that are looked into
SLURM_LOG_ENTRIES = 20_000  # and entries, in one search
LAST_LOG_LINES = 20
LAST_LOG_CHARS = 500  # per line
LEDGER_RETRY_S = 1.0  # a ledger that cannot write is tried again
CHILD_BACKOFF_BASE_MS = 200  # restarts of mover and holder
CHILD_BACKOFF_CAP_MS = 30_000
CONNECT_TIMEOUT_S = 10.0
RECONNECT_BASE_MS = 500
RECONNECT_CAP_MS = 30_000
RECONNECT_REFUSED_MS = 60_000  # after a refusal that only a person can mend
