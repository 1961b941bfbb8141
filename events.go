package offloadhook

import (
	"bytes"
	"embed"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"
	"unicode"
	"unicode/utf16"
	"unicode/utf8"
)

// Fixtures holds testdata/*.json: for each event type an example of both published contracts, a and b, as Offload
// would send it. Fixtures.ReadFile("testdata/case_completed_b.json") reads one, from a vendored copy too.
// A program that does not use Fixtures does not carry it.
//
//go:embed testdata/*.json
var Fixtures embed.FS

// EventType says what happened to a case. It is an open set: Offload may send types that have no constant here.
type EventType string

// The event types of the published contracts.
const (
	TypeCaseCompleted   EventType = "case.completed"
	TypeCaseFailed      EventType = "case.failed"
	TypeCaseInputNeeded EventType = "case.input_needed"
)

// Millis is a time in Unix milliseconds, as Offload sends it; 0 when it was absent.
type Millis int64

// Time returns m as a time in UTC, and the zero Time for 0.
func (m Millis) Time() time.Time {
	if m == 0 {
		return time.Time{}
	}
	return time.UnixMilli(int64(m)).UTC()
}

// Envelope is what all events have in common. ParseEnvelope makes one, whose Data and Raw share the memory of the body:
// treat both as read-only.
type Envelope struct {
	EventID   string          `json:"event_id"`   // 1 to 255 bytes of UTF-8 without control characters
	EventType EventType       `json:"event_type"` // "" when absent or not a string
	Timestamp Millis          `json:"timestamp"`  // 0 when absent or not an integer
	Data      json.RawMessage `json:"data"`       // the payload, any JSON; nil when absent
	Raw       []byte          `json:"-"`          // the body exactly as received
}

// ParseEnvelope reads the envelope of one event, without copying body. It refuses only what cannot be an event, with an
// error that wraps ErrMalformed and never quotes the body: text that is not exactly one JSON object (nested 10,000 deep
// at most), and an event_id that is missing, doubled or unusable. Everything else may drift without costing an event
// (promise 6).
func ParseEnvelope(body []byte) (*Envelope, error) {
	env := new(Envelope)
	if err := env.parse(body); err != nil {
		return nil, err
	}
	return env, nil
}

// EventID returns the id that Offload gives to the event of type t for the update of a case at updatedAt:
// evt_<caseId>_<type with . as _>_<ms>. A poller that reads a case can so tell which event it would have received.
func EventID(caseID string, t EventType, updatedAt Millis) string {
	return "evt_" + caseID + "_" + strings.ReplaceAll(string(t), ".", "_") + "_" + strconv.FormatInt(int64(updatedAt), 10)
}

// Status is the state of a case. It is an open set.
type Status string

// The statuses that Offload documents. Events are sent for the last three.
const (
	StatusCreated     Status = "CREATED"
	StatusRunning     Status = "RUNNING"
	StatusInputNeeded Status = "INPUT_NEEDED"
	StatusCompleted   Status = "COMPLETED"
	StatusFailed      Status = "FAILED"
)

// ResultStatus says how a case ended. It is an open set; "" when absent.
type ResultStatus string

// The result statuses of the published contracts.
const (
	ResultGoalAchieved   ResultStatus = "goal_achieved"
	ResultMaxRetries     ResultStatus = "max_retries"
	ResultFailedRejected ResultStatus = "failed_rejected"
	ResultBounced        ResultStatus = "BOUNCED"
	ResultComplained     ResultStatus = "COMPLAINED"
	ResultRejected       ResultStatus = "REJECTED"
)

// Case holds the fields that the data of all three events share.
type Case struct {
	CaseID            string          `json:"caseId"`
	ClientReferenceID string          `json:"clientReferenceId,omitzero"` // as given at creation
	Status            Status          `json:"status"`
	Channel           string          `json:"channel"` // EMAIL; SMS is in Offload's schema
	AttemptCount      int             `json:"attemptCount"`
	Attachments       []Attachment    `json:"attachments,omitzero"` // nil when absent (contract a) or null
	ResultStatus      ResultStatus    `json:"resultStatus,omitzero"`
	Metadata          json.RawMessage `json:"metadata,omitzero"` // the JSON given at creation, unchanged; nil when absent
}

// Attachment describes a file that came with a case. Its content is fetched through Offload's attachments endpoint.
type Attachment struct {
	AttachmentID string `json:"attachmentId"`
	Name         string `json:"name"`
	Size         int64  `json:"size"` // bytes
	Type         string `json:"type"` // a media type
	MessageID    string `json:"messageId"`
	InboxID      string `json:"inboxId"`
	ReceivedAt   Millis `json:"receivedAt"`
}

// CaseCompleted is the data of a case.completed event.
type CaseCompleted struct {
	Case
	Result json.RawMessage `json:"result,omitzero"` // any JSON, of the resultSchema given at creation; nil when absent
}

// CaseFailed is the data of a case.failed event.
type CaseFailed struct {
	Case
	FailureReason string `json:"failureReason,omitzero"` // "" when absent or null
}

// CaseInputNeeded is the data of a case.input_needed event: Offload waits for an answer to InputRequest. Keep
// InputRequestID: POST /cases/{id}/input wants it back.
type CaseInputNeeded struct {
	Case
	InputRequest       string `json:"inputRequest"`
	InputRequestID     string `json:"inputRequestId"`
	InputRequestStatus string `json:"inputRequestStatus"` // PENDING when sent; an open set
	InputRequestedAt   Millis `json:"inputRequestedAt"`
}

// decode reads the payload of env into a new T. Its error names the field and never quotes the payload.
func decode[T any](env *Envelope) (*T, error) {
	if len(env.Data) == 0 || env.Data[0] != '{' {
		return nil, errors.New("offloadhook: data is missing or not an object")
	}
	payload := new(T)
	err := json.Unmarshal(env.Data, payload)
	if mismatch := (*json.UnmarshalTypeError)(nil); errors.As(err, &mismatch) {
		kind, _, _ := strings.Cut(mismatch.Value, " ") // "number 12" would quote the payload
		return nil, fmt.Errorf("offloadhook: data does not fit: %s is a JSON %s, want %s", mismatch.Field, kind, mismatch.Type)
	}
	if err != nil {
		return nil, errors.New("offloadhook: data does not decode")
	}
	return payload, nil
}

// caseID returns the caseId of the event's data, "" where there is none.
func (env *Envelope) caseID() string {
	members := object(env.Data, 0, 0)
	for key, value := members.next(); key != nil; key, value = members.next() {
		if isName(key, "caseId") {
			return text(value)
		}
	}
	return ""
}

// parse fills env from body in one pass. It is the checking half of encoding/json by hand, because that package would
// read the body three times: to check it, to find data, and to check data again.
func (env *Envelope) parse(body []byte) error {
	*env = Envelope{Raw: body}
	seen := false
	start := skipSpace(body, 0)
	members := object(body, start, 0)
	for key, value := members.next(); key != nil; key, value = members.next() {
		switch {
		case isName(key, "event_id"):
			if seen {
				return fmt.Errorf("%w: event_id occurs twice", ErrMalformed)
			}
			seen = true
			if env.EventID = text(value); loneSurrogate(value) || !utf8.Valid(value) || !usableID(env.EventID) {
				return fmt.Errorf("%w: event_id is not a string of 1 to 255 bytes without control characters", ErrMalformed)
			}
		case isName(key, "event_type"):
			switch string(value) { // the usual ones without an allocation
			case `"case.completed"`:
				env.EventType = TypeCaseCompleted
			case `"case.failed"`:
				env.EventType = TypeCaseFailed
			case `"case.input_needed"`:
				env.EventType = TypeCaseInputNeeded
			default:
				env.EventType = EventType(text(value))
			}
		case isName(key, "timestamp"):
			ms, err := strconv.ParseInt(string(value), 10, 64)
			if err != nil {
				ms = 0 // ParseInt returns the nearest value when out of range
			}
			env.Timestamp = Millis(ms)
		case isName(key, "data"):
			env.Data = value
		}
	}
	if members.end < 0 || skipSpace(body, members.end) != len(body) {
		return fmt.Errorf("%w: the body is not exactly one JSON object", ErrMalformed)
	}
	if !seen {
		return fmt.Errorf("%w: event_id is missing", ErrMalformed)
	}
	return nil
}

// usableID reports whether id can serve as an event's id: in a log line, as a database key, as a line of the journal.
func usableID(id string) bool {
	return id != "" && len(id) <= 255 && utf8.ValidString(id) && strings.IndexFunc(id, unicode.IsControl) < 0
}

// isName reports whether key, a JSON string with its quotes, spells name.
func isName(key []byte, name string) bool {
	if bytes.IndexByte(key, '\\') >= 0 {
		return text(key) == name
	}
	return string(key[1:len(key)-1]) == name
}

// text returns what the JSON string value spells, "" if value is not a string.
func text(value []byte) string {
	if value[0] != '"' {
		return ""
	}
	for _, c := range value {
		if c == '\\' || c >= utf8.RuneSelf {
			var s string
			_ = json.Unmarshal(value, &s) // value has been scanned: it is a JSON string
			return s
		}
	}
	return string(value[1 : len(value)-1])
}

// loneSurrogate reports whether value has a \u escape that is half of a surrogate pair. encoding/json reads each of
// them as U+FFFD, which would make one id of two.
func loneSurrogate(value []byte) bool {
	for i := 0; i < len(value); i++ {
		if value[i] != '\\' {
			continue
		}
		if i++; value[i] != 'u' {
			continue
		}
		r := unhex(value[i+1:])
		i += 4
		if !utf16.IsSurrogate(r) {
			continue
		}
		if value[i+1] != '\\' || value[i+2] != 'u' || utf16.DecodeRune(r, unhex(value[i+3:])) == unicode.ReplacementChar {
			return true
		}
		i += 6
	}
	return false
}

// unhex reads the four hexadecimal digits at the start of b, -1 if they are not that.
func unhex(b []byte) rune {
	if len(b) < 4 {
		return -1
	}
	r := rune(0)
	for _, c := range b[:4] {
		switch {
		case '0' <= c && c <= '9':
			r = r<<4 | rune(c-'0')
		case 'a' <= c|0x20 && c|0x20 <= 'f':
			r = r<<4 | rune(c|0x20-'a'+10)
		default:
			return -1
		}
	}
	return r
}

// members walks over the members of one JSON object, checking all of its syntax on the way.
type members struct {
	text  []byte
	pos   int // of the next member, or of the closing brace
	depth int
	end   int // behind the closing brace when next has returned nil; -1 if the text is not a JSON object
}

// object returns the members of the object at text[pos:], which lies depth levels deep.
func object(text []byte, pos, depth int) members {
	m := members{text: text, depth: depth + 1, end: -1}
	if pos < len(text) && text[pos] == '{' && m.depth <= maxDepth {
		m.pos = skipSpace(text, pos+1)
	}
	return m
}

// next returns the next key, with its quotes, and its value; nil when the object ends or its text is no JSON.
func (m *members) next() (key, value []byte) {
	i := m.pos
	if i <= 0 || i >= len(m.text) {
		return nil, nil
	}
	m.pos = 0 // nothing follows a fault
	if m.text[i] == '}' && m.end < 0 {
		m.end = i + 1
		return nil, nil
	}
	start := i
	if i = skipString(m.text, i); i < 0 {
		return nil, nil
	}
	key = m.text[start:i]
	if i = skipSpace(m.text, i); i == len(m.text) || m.text[i] != ':' {
		return nil, nil
	}
	start = skipSpace(m.text, i+1)
	if i = skipValue(m.text, start, m.depth); i < 0 {
		return nil, nil
	}
	value = m.text[start:i:i]
	switch i = skipSpace(m.text, i); {
	case i == len(m.text):
		return nil, nil
	case m.text[i] == ',':
		// A closing brace may not follow: point at it would end the object.
		if i = skipSpace(m.text, i+1); i == len(m.text) || m.text[i] != '"' {
			return nil, nil
		}
	case m.text[i] != '}':
		return nil, nil
	}
	m.pos = i
	return key, value
}

// maxDepth is how deep encoding/json reads.
const maxDepth = 10000

// skipValue returns the index behind the JSON value that starts at b[i], -1 if there is none. depth counts the objects
// and arrays around it.
func skipValue(b []byte, i, depth int) int {
	if i >= len(b) {
		return -1
	}
	switch c := b[i]; {
	case c == '"':
		return skipString(b, i)
	case c == '{':
		m := object(b, i, depth)
		for key, _ := m.next(); key != nil; key, _ = m.next() {
		}
		return m.end
	case c == '[':
		if depth++; depth > maxDepth {
			return -1
		}
		if i = skipSpace(b, i+1); i < len(b) && b[i] == ']' {
			return i + 1
		}
		for {
			if i = skipValue(b, i, depth); i < 0 {
				return -1
			}
			switch i = skipSpace(b, i); {
			case i == len(b):
				return -1
			case b[i] == ']':
				return i + 1
			case b[i] != ',':
				return -1
			}
			i = skipSpace(b, i+1)
		}
	case c == '-' || '0' <= c && c <= '9':
		return skipNumber(b, i)
	}
	for _, word := range [...]string{"null", "true", "false"} {
		if len(b)-i >= len(word) && string(b[i:i+len(word)]) == word {
			return i + len(word)
		}
	}
	return -1
}

func skipNumber(b []byte, i int) int {
	if b[i] == '-' {
		i++
	}
	first := i
	if i = skipDigits(b, i); i == first || b[first] == '0' && i > first+1 {
		return -1
	}
	if i < len(b) && b[i] == '.' {
		first = i + 1
		if i = skipDigits(b, first); i == first {
			return -1
		}
	}
	if i < len(b) && b[i]|0x20 == 'e' {
		if i++; i < len(b) && (b[i] == '+' || b[i] == '-') {
			i++
		}
		first = i
		if i = skipDigits(b, i); i == first {
			return -1
		}
	}
	return i
}

func skipDigits(b []byte, i int) int {
	for i < len(b) && '0' <= b[i] && b[i] <= '9' {
		i++
	}
	return i
}

func skipString(b []byte, i int) int {
	if b[i] != '"' {
		return -1
	}
	for i++; i < len(b); i++ {
		switch c := b[i]; {
		case c == '"':
			return i + 1
		case c < ' ':
			return -1
		case c == '\\':
			if i++; i == len(b) {
				return -1
			}
			switch b[i] {
			case '"', '\\', '/', 'b', 'f', 'n', 'r', 't':
			case 'u':
				if unhex(b[i+1:]) < 0 {
					return -1
				}
				i += 4
			default:
				return -1
			}
		}
	}
	return -1
}

func skipSpace(b []byte, i int) int {
	for i < len(b) && (b[i] == ' ' || b[i] == '\n' || b[i] == '\r' || b[i] == '\t') {
		i++
	}
	return i
}
