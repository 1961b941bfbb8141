package offloadhook

import (
	"bytes"
	"embed"
	"encoding/json"
	"errors"
	"fmt"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
	"unicode"
	"unicode/utf8"
)

// Fixtures holds testdata/*.json: for each event type an example from each of the two published contracts, a and the
// newer b, as Offload would send it. Fixtures.ReadFile("testdata/case_completed_b.json") reads one, in a vendored copy
// too. A program that does not use Fixtures does not contain it.
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

// EventID returns the id that Offload gives to the event of type t for the update of a case at updatedAt:
// evt_<caseId>_<type with . as _>_<ms>. So a poller that reads a case can tell which event it would have received.
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
	Result json.RawMessage `json:"result,omitzero"` // any JSON, as in the resultSchema given at creation; nil when absent
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

// ParseEnvelope reads the envelope of one event, without copying body. It refuses only what cannot be an event: text
// that is not exactly one JSON object (nested 10,000 deep at most), and an event_id that is missing, doubled or
// unusable. The error wraps ErrMalformed and never quotes the body. Everything else may drift without costing an event
// (promise 6).
func ParseEnvelope(body []byte) (*Envelope, error) {
	env, _, err := parse(body)
	return env, err
}

// parse is ParseEnvelope, and returns the caseId of the data, too: to look for it later would take half as long again.
func parse(body []byte) (env *Envelope, caseID string, err error) {
	env = &Envelope{Raw: slices.Clip(body)}
	var id []byte
	ids := 0
	start := skipSpace(body, 0)
	end := scan(body, start, nesting, func(name []byte, i int) int {
		after, inside := scanData(body, i, nesting-1)
		if after < 0 {
			return after
		}
		switch value := body[i:after:after]; string(name) {
		case "event_id":
			ids++
			id, env.EventID = value, text(value)
		case "event_type":
			env.EventType = EventType(text(value))
		case "timestamp":
			env.Timestamp = 0
			if ms, err := strconv.ParseInt(string(value), 10, 64); err == nil {
				env.Timestamp = Millis(ms)
			}
		case "data":
			env.Data, caseID = value, inside
		}
		return after
	})
	switch {
	case end < 0 || at(body, start) != '{' || skipSpace(body, end) < len(body):
		return nil, "", fmt.Errorf("%w: the body is not exactly one JSON object", ErrMalformed)
	case ids == 0:
		return nil, "", fmt.Errorf("%w: event_id is missing", ErrMalformed)
	case ids > 1:
		return nil, "", fmt.Errorf("%w: event_id occurs twice", ErrMalformed)
	case !usableID(env.EventID) || !utf8.Valid(id) || halfPair(id, env.EventID):
		return nil, "", fmt.Errorf("%w: event_id is not a string of 1 to 255 bytes without control characters", ErrMalformed)
	}
	return env, caseID, nil
}

// decode reads the payload of env into a new T. Its error names the field and never quotes the payload.
func decode[T any](env *Envelope) (*T, error) {
	if at(env.Data, 0) != '{' {
		return nil, errors.New("offloadhook: data is missing or not an object")
	}
	payload := new(T)
	end, field, err := fill(reflect.ValueOf(payload).Elem(), env.Data, 0)
	if end >= 0 {
		return payload, nil
	}
	if mismatch := (*json.UnmarshalTypeError)(nil); errors.As(err, &mismatch) {
		kind, _, _ := strings.Cut(mismatch.Value, " ") // of "number 12", which would quote the payload
		return nil, fmt.Errorf("offloadhook: data does not fit: %s is a JSON %s, want %s", field[1:], kind, mismatch.Type)
	}
	return nil, errors.New("offloadhook: data does not decode")
}

// fill decodes the value that starts at b[i] into v, and returns the index after it, or -1. It does as encoding/json,
// which would check again what has been scanned, and take most of the time of a delivery. Unlike there, names match
// exactly, raw values share the memory of the body, a doubled array replaces the first, and the first error, which is
// about field, ends it.
func fill(v reflect.Value, b []byte, i int) (end int, field string, err error) {
	var member func(name []byte, i int) int
	raw, first := v.Type() == reflect.TypeFor[json.RawMessage](), at(b, i)
	switch {
	case v.Kind() == reflect.Struct && first == '{':
		fields := fieldsOf(v.Type())
		member = func(name []byte, i int) (after int) {
			index, known := fields[string(name)]
			if !known {
				return scan(b, i, nesting, nil)
			}
			if after, field, err = fill(v.FieldByIndex(index), b, i); err != nil {
				field = "." + string(name) + field
			}
			return after
		}
	case v.Kind() == reflect.Slice && first == '[' && !raw:
		v.SetZero()
		v.Grow(1) // not nil, as for absent and null
		member = func(_ []byte, i int) (after int) {
			n := v.Len()
			v.Grow(1)
			v.SetLen(n + 1)
			after, field, err = fill(v.Index(n), b, i)
			return after
		}
	}
	if end = scan(b, i, nesting, member); end < 0 || member != nil {
		return end, field, err
	}
	switch value := b[i:end:end]; {
	case raw:
		v.SetBytes(value)
	case v.Kind() == reflect.String && first == '"':
		v.SetString(text(value))
	default:
		n, other := strconv.ParseInt(string(value), 10, 64)
		if other == nil && v.CanInt() && !v.OverflowInt(n) {
			v.SetInt(n)
		} else if err = json.Unmarshal(value, v.Addr().Interface()); err != nil {
			end = -1
		}
	}
	return end, "", err
}

// fieldsOf returns the fields of a struct, by their names in JSON.
func fieldsOf(t reflect.Type) map[string][]int {
	if fields, found := structFields.Load(t); found {
		return fields.(map[string][]int)
	}
	fields := make(map[string][]int)
	for _, field := range reflect.VisibleFields(t) {
		if name, _, _ := strings.Cut(field.Tag.Get("json"), ","); name != "" {
			fields[name] = field.Index
		}
	}
	structFields.Store(t, fields)
	return fields
}

var structFields sync.Map

// scanData scans the data of an event, which starts at b[i], and returns the index after it and its caseId, "" where
// there is none. As in the payload, the last that is not null counts.
func scanData(b []byte, i, deepest int) (end int, caseID string) {
	end = scan(b, i, deepest, func(name []byte, i int) int {
		after := scan(b, i, deepest-1, nil)
		if string(name) == "caseId" && after > 0 && string(b[i:after]) != "null" {
			caseID = text(b[i:after])
		}
		return after
	})
	return end, caseID
}

// usableID reports whether id can serve as an event's id: in a log line, as a database key, in a line of the journal.
func usableID(id string) bool {
	return id != "" && len(id) <= 255 && utf8.ValidString(id) && strings.IndexFunc(id, unicode.IsControl) < 0
}

// halfPair reports whether value, a JSON string that spells id, has a \u escape that is half of a surrogate pair:
// encoding/json reads each such half as U+FFFD, which would make one id of two.
func halfPair(value []byte, id string) bool {
	n := strings.Count(id, "\uFFFD")
	if n == 0 {
		return false
	}
	spelled := bytes.ToLower(bytes.ReplaceAll(value, []byte(`\\`), nil)) // without escaped backslashes
	return n != bytes.Count(spelled, []byte(`\ufffd`))+bytes.Count(spelled, []byte("\uFFFD"))
}

// text returns what a JSON string spells, "" if value is not one.
func text(value []byte) string {
	if at(value, 0) != '"' {
		return ""
	}
	if bytes.IndexByte(value, '\\') < 0 && utf8.Valid(value) {
		return string(value[1 : len(value)-1])
	}
	var s string
	_ = json.Unmarshal(value, &s)
	return s
}

// nesting is how deep a body may be nested: as deep as for encoding/json.
const nesting = 10_000

// scan returns the index after the JSON value that starts at b[i], or -1 if none does or it nests more than deepest.
// If it is an object or array, member is called where each value in it starts, in an array without a name; it scans
// that value itself, and returns the same.
func scan(b []byte, i, deepest int, member func(name []byte, i int) int) int {
	var room [64]byte
	closers := room[:0] // of what is open; with recursion, short bodies would make large stacks
	for {
		n := len(closers)
		var name []byte
		if n > 0 && closers[n-1] == '}' {
			end := scanString(b, i)
			if end < 0 {
				return -1
			}
			if name = b[i+1 : end-1]; member != nil && bytes.IndexByte(name, '\\') >= 0 {
				name = []byte(text(b[i:end]))
			}
			if i = skipSpace(b, end); at(b, i) != ':' {
				return -1
			}
			i = skipSpace(b, i+1)
		}
		switch first := at(b, i); {
		case n == 1 && member != nil:
			i = member(name, i)
		case first == '"':
			i = scanString(b, i)
		case first == '{' || first == '[':
			inside := skipSpace(b, i+1)
			if n == deepest {
				return -1
			}
			if at(b, inside) != first+2 { // ] comes two after [, and } after {
				closers, i = append(closers, first+2), inside
				continue
			}
			i = inside + 1
		default: // a number, true, false, or null
			end, digits := i, '1' <= first && first <= '9'
			for c := first; c > ' ' && c != ',' && c != ']' && c != '}'; c = at(b, end) {
				digits = digits && '0' <= c && c <= '9'
				end++
			}
			if !digits && !json.Valid(b[i:end]) {
				return -1
			}
			i = end
		}
		for {
			if i < 0 || n == 0 {
				return i
			}
			if i = skipSpace(b, i); at(b, i) != closers[n-1] {
				break
			}
			n, i = n-1, i+1
			closers = closers[:n]
		}
		if at(b, i) != ',' {
			return -1
		}
		i = skipSpace(b, i+1)
	}
}

// scanString returns the index after the JSON string that starts at b[i], or -1 if none does.
func scanString(b []byte, i int) int {
	if at(b, i) != '"' {
		return -1
	}
	for i++; i < len(b) && b[i] >= ' '; i++ {
		switch b[i] {
		case '"':
			return i + 1
		case '\\':
			if i++; at(b, i) == 'u' {
				for range 4 {
					if i++; strings.IndexByte("0123456789abcdefABCDEF", at(b, i)) < 0 {
						return -1
					}
				}
			} else if strings.IndexByte(`"\/bfnrt`, at(b, i)) < 0 {
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

// at returns b[i], and past the end 0, which is no part of any JSON.
func at(b []byte, i int) byte {
	if i < len(b) {
		return b[i]
	}
	return 0
}
