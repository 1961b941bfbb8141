package offloadhook_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"iter"
	"maps"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
	"unicode"
	"unicode/utf8"

	"offloadhook"
)

// The example of every event type in both published contracts, field for field. Result and Metadata stand here without
// white space.
var fixtures = []struct {
	file string
	env  offloadhook.Envelope // without Data and Raw
	data any
}{
	{
		"case_completed_a",
		offloadhook.Envelope{
			EventID:   "evt_case_123_case_completed_1774131900000",
			EventType: offloadhook.TypeCaseCompleted,
			Timestamp: 1774131900000,
		},
		&offloadhook.CaseCompleted{
			Case: offloadhook.Case{
				CaseID:            "case_123",
				ClientReferenceID: "vendor_2048",
				Status:            offloadhook.StatusCompleted,
				Channel:           "EMAIL",
				AttemptCount:      2,
				ResultStatus:      offloadhook.ResultGoalAchieved,
			},
			Result: json.RawMessage(`{"signedW9Received":true,"taxId":"12-3456789",` +
				`"documentUrl":"https://files.example.com/w9.pdf"}`),
		},
	},
	{
		"case_completed_b",
		offloadhook.Envelope{
			EventID:   "evt_4fc5904d-0e44-4ed3-aa57-c4a47ad0ae4f_case_completed_1774131900000",
			EventType: offloadhook.TypeCaseCompleted,
			Timestamp: 1774131900000,
		},
		&offloadhook.CaseCompleted{
			Case: offloadhook.Case{
				CaseID:            "4fc5904d-0e44-4ed3-aa57-c4a47ad0ae4f",
				ClientReferenceID: "vendor_2048",
				Status:            offloadhook.StatusCompleted,
				Channel:           "EMAIL",
				AttemptCount:      2,
				Attachments: []offloadhook.Attachment{{
					AttachmentID: "63016fee-124b-46d8-a3e5-616f187a6c41",
					Name:         "vendor-w9.pdf",
					Size:         904860,
					Type:         "application/pdf",
					MessageID:    "<message-id@example.com>",
					InboxID:      "dev-test@agentmail.to",
					ReceivedAt:   1774131900000,
				}},
				ResultStatus: offloadhook.ResultGoalAchieved,
				Metadata:     json.RawMessage(`{"vendorId":"vendor_2048"}`),
			},
			Result: json.RawMessage(`{"signedW9Received":true,"receivedAt":"2026-03-21T15:42:00Z"}`),
		},
	},
	{
		"case_failed_a",
		offloadhook.Envelope{
			EventID:   "evt_case_123_case_failed_1774131900000",
			EventType: offloadhook.TypeCaseFailed,
			Timestamp: 1774131900000,
		},
		&offloadhook.CaseFailed{
			Case: offloadhook.Case{
				CaseID:       "case_123",
				Status:       offloadhook.StatusFailed,
				Channel:      "EMAIL",
				AttemptCount: 3,
				ResultStatus: offloadhook.ResultMaxRetries,
			},
			FailureReason: "Maximum follow-up attempts reached.",
		},
	},
	{
		"case_failed_b",
		offloadhook.Envelope{
			EventID:   "evt_4fc5904d-0e44-4ed3-aa57-c4a47ad0ae4f_case_failed_1774131900000",
			EventType: offloadhook.TypeCaseFailed,
			Timestamp: 1774131900000,
		},
		&offloadhook.CaseFailed{
			Case: offloadhook.Case{
				CaseID:       "4fc5904d-0e44-4ed3-aa57-c4a47ad0ae4f",
				Status:       offloadhook.StatusFailed,
				Channel:      "EMAIL",
				AttemptCount: 3,
				Attachments:  []offloadhook.Attachment{},
				ResultStatus: offloadhook.ResultMaxRetries,
			},
		},
	},
	{
		"case_input_needed_a",
		offloadhook.Envelope{
			EventID:   "evt_case_123_case_input_needed_1774131900000",
			EventType: offloadhook.TypeCaseInputNeeded,
			Timestamp: 1774131900000,
		},
		&offloadhook.CaseInputNeeded{
			Case: offloadhook.Case{
				CaseID:       "case_123",
				Status:       offloadhook.StatusInputNeeded,
				Channel:      "EMAIL",
				AttemptCount: 1,
			},
			InputRequest:       "The counterparty asked whether a Tuesday deadline is acceptable.",
			InputRequestID:     "input-request-123",
			InputRequestStatus: "PENDING",
			InputRequestedAt:   1774131900000,
		},
	},
	{
		"case_input_needed_b",
		offloadhook.Envelope{
			EventID:   "evt_4fc5904d-0e44-4ed3-aa57-c4a47ad0ae4f_case_input_needed_1774131900300",
			EventType: offloadhook.TypeCaseInputNeeded,
			Timestamp: 1774131900300,
		},
		&offloadhook.CaseInputNeeded{
			Case: offloadhook.Case{
				CaseID:       "4fc5904d-0e44-4ed3-aa57-c4a47ad0ae4f",
				Status:       offloadhook.StatusInputNeeded,
				Channel:      "EMAIL",
				AttemptCount: 1,
				Attachments:  []offloadhook.Attachment{},
			},
			InputRequest:       "The vendor asked whether a signed PDF is acceptable. How should I respond?",
			InputRequestID:     "c8c6a7ca-a913-4d13-8cd8-5887efb0531c",
			InputRequestStatus: "PENDING",
			InputRequestedAt:   1774131900300,
		},
	},
}

func TestFixturesDecode(t *testing.T) {
	var files []string
	for _, f := range fixtures {
		files = append(files, "testdata/"+f.file+".json")
		t.Run(f.file, func(t *testing.T) {
			body := readFixture(t, f.file)
			tr := newTrace()
			if fresh, err := tr.deliver(t, tr.callbacks(), body); !fresh || err != nil {
				t.Fatalf("Deliver = %v, %v", fresh, err)
			}
			call := tr.onlyCall(t)
			if got, want := call.name, nameOf(f.data); got != want {
				t.Fatalf("%s was called, want %s", got, want)
			}

			env := *call.env
			if !bytes.Equal(env.Raw, body) {
				t.Errorf("Raw = %q", env.Raw)
			}
			if !sameJSON(t, env.Data, member(t, body, "data")) {
				t.Errorf("Data = %s", env.Data)
			}
			env.Raw, env.Data = nil, nil
			if !reflect.DeepEqual(env, f.env) {
				t.Errorf("envelope:\n got %+v\nwant %+v", env, f.env)
			}

			if got := compacted(t, call.payload); !reflect.DeepEqual(got, f.data) {
				t.Errorf("payload:\n got %+v\nwant %+v", got, f.data)
			}
			tr.wantOutcomes(t, offloadhook.Accepted, offloadhook.Handled)
		})
	}
	all, err := fs.Glob(offloadhook.Fixtures, "testdata/*")
	if err != nil || !slices.Equal(all, files) {
		t.Errorf("Fixtures holds %v, %v, want %v", all, err, files)
	}
}

// A field that a struct lacks would be missing after the round trip.
func TestRoundTripKeepsTheMeaning(t *testing.T) {
	for _, f := range fixtures {
		t.Run(f.file, func(t *testing.T) {
			body := readFixture(t, f.file)
			env, err := offloadhook.ParseEnvelope(body)
			if err != nil {
				t.Fatal(err)
			}
			again, err := json.Marshal(env)
			if err != nil || !sameJSON(t, again, body) {
				t.Errorf("envelope became %s, %v", again, err)
			}

			first := reflect.New(reflect.TypeOf(f.data).Elem()).Interface()
			second := reflect.New(reflect.TypeOf(f.data).Elem()).Interface()
			unmarshal(t, env.Data, first)
			data, err := json.Marshal(first)
			if err != nil {
				t.Fatal(err)
			}
			unmarshal(t, data, second)
			if !reflect.DeepEqual(compacted(t, first), compacted(t, second)) {
				t.Errorf("payload became %+v", second)
			}
			var got, want map[string]any
			unmarshal(t, data, &got)
			unmarshal(t, env.Data, &want)
			if want["failureReason"] == nil {
				delete(want, "failureReason") // null says what none says
			}
			if !reflect.DeepEqual(got, want) {
				t.Errorf("data became %s", data)
			}
		})
	}

	t.Run("what is absent stays absent", func(t *testing.T) {
		for _, payload := range []any{
			new(offloadhook.CaseCompleted), new(offloadhook.CaseFailed), new(offloadhook.CaseInputNeeded),
		} {
			data, err := json.Marshal(payload)
			if err != nil {
				t.Fatal(err)
			}
			for _, optional := range []string{
				"clientReferenceId", "attachments", "resultStatus", "metadata", "result", "failureReason",
			} {
				if got := member(t, data, optional); got != nil {
					t.Errorf("%s: %s = %s", nameOf(payload), optional, got)
				}
			}
		}
	})
	t.Run("unlike the examples", func(t *testing.T) {
		data := []byte(`{"caseId":"c","status":"PAUSED","channel":"PIGEON","attemptCount":0,"attachments":[],` +
			`"resultStatus":"teleported","metadata":{"n":0.10,"big":123456789012345678901234567890,"none":null},` +
			`"result":[1e400,-0,null,"<\u2028>"]}`)
		var c, again offloadhook.CaseCompleted
		unmarshal(t, data, &c)
		marshalled, err := json.Marshal(c)
		if err != nil || !sameJSON(t, marshalled, data) {
			t.Errorf("data became %s, %v", marshalled, err)
		}
		unmarshal(t, marshalled, &again)
		if !sameJSON(t, again.Result, c.Result) || !sameJSON(t, again.Metadata, c.Metadata) {
			t.Errorf("payload became %+v", again)
		}
	})
}

func TestNumbersKeepEveryDigit(t *testing.T) {
	for _, number := range []string{
		"0", "-0", "0.10", "1E+2", "1e400", "9007199254740993", "123456789012345678901234567890",
		"3.14159265358979323846264338327950288", `"12-3456789"`,
	} {
		t.Run(number, func(t *testing.T) {
			result, metadata := `{ "n": [ `+number+` ] }`, `{"n":`+number+`}`
			tr := newTrace()
			if _, err := tr.deliver(t, tr.callbacks(), []byte(`{"event_id":"evt_1","event_type":"case.completed",`+
				`"data":{"metadata": `+metadata+` ,"result": `+result+` }}`)); err != nil {
				t.Fatal(err)
			}
			c, ok := tr.onlyCall(t).payload.(*offloadhook.CaseCompleted)
			if !ok || string(c.Result) != result || string(c.Metadata) != metadata {
				t.Errorf("got %+v", c)
			}
		})
	}
}

func TestUnusualPayloads(t *testing.T) {
	decode := func(t *testing.T, kind offloadhook.EventType, data string) call {
		t.Helper()
		tr := newTrace()
		body := fmt.Sprintf(`{"event_id":"evt_1","event_type":%q,"data":%s}`, kind, data)
		if _, err := tr.deliver(t, tr.callbacks(), []byte(body)); err != nil {
			t.Fatal(err)
		}
		tr.wantOutcomes(t, offloadhook.Accepted, offloadhook.Handled)
		return tr.onlyCall(t)
	}
	for _, tt := range []struct {
		name, data string
		want       offloadhook.CaseFailed
	}{
		{"nothing", `{}`, offloadhook.CaseFailed{}},
		{"unknown field", `{"nextActionAt":17,"counterparty":{"email":"a@example.com"}}`, offloadhook.CaseFailed{}},
		{"attachments null", `{"attachments":null}`, offloadhook.CaseFailed{}},
		{"attachments empty", `{"attachments":[]}`,
			offloadhook.CaseFailed{Case: offloadhook.Case{Attachments: []offloadhook.Attachment{}}}},
		{"attachment empty", `{"attachments":[{}]}`,
			offloadhook.CaseFailed{Case: offloadhook.Case{Attachments: []offloadhook.Attachment{{}}}}},
		{"failureReason null", `{"failureReason":null}`, offloadhook.CaseFailed{}},
		{"failureReason empty", `{"failureReason":""}`, offloadhook.CaseFailed{}},
		{"failureReason", `{"failureReason":"no answer"}`, offloadhook.CaseFailed{FailureReason: "no answer"}},
		{"metadata null", `{"metadata":null}`,
			offloadhook.CaseFailed{Case: offloadhook.Case{Metadata: json.RawMessage("null")}}},
		{"metadata not an object", `{"metadata":[1]}`,
			offloadhook.CaseFailed{Case: offloadhook.Case{Metadata: json.RawMessage("[1]")}}},
		{"unknown enum values", `{"status":"PAUSED","channel":"FAX","resultStatus":"lost"}`,
			offloadhook.CaseFailed{Case: offloadhook.Case{Status: "PAUSED", Channel: "FAX", ResultStatus: "lost"}}},
		{"lone surrogates and bad UTF-8", `{"failureReason":"\ud800` + "\xff" + `","metadata":"\udc00` + "\xff" + `"}`,
			offloadhook.CaseFailed{
				Case:          offloadhook.Case{Metadata: json.RawMessage(`"\udc00` + "\xff" + `"`)},
				FailureReason: "\ufffd\ufffd",
			}},
		{"null wherever it may be", `{"caseId":null,"clientReferenceId":null,"status":null,"channel":null,` +
			`"attemptCount":null,"resultStatus":null}`, offloadhook.CaseFailed{}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if got := decode(t, offloadhook.TypeCaseFailed, tt.data).payload; !reflect.DeepEqual(got, &tt.want) {
				t.Errorf("got %+v, want %+v", got, tt.want)
			}
		})
	}
	t.Run("inputRequestStatus", func(t *testing.T) {
		got := decode(t, offloadhook.TypeCaseInputNeeded, `{"inputRequestStatus":"EXPIRED"}`).payload
		if want := (&offloadhook.CaseInputNeeded{InputRequestStatus: "EXPIRED"}); !reflect.DeepEqual(got, want) {
			t.Errorf("got %+v, want %+v", got, want)
		}
	})
	for _, result := range []string{"null", "true", "17", `"text"`, `[ 1 ]`, `{ }`} {
		t.Run("result "+result, func(t *testing.T) {
			got := decode(t, offloadhook.TypeCaseCompleted, `{"result":`+result+`}`).payload
			want := &offloadhook.CaseCompleted{Result: json.RawMessage(result)}
			if !reflect.DeepEqual(got, want) {
				t.Errorf("got %+v, want %+v", got, want)
			}
		})
	}
	t.Run("result absent", func(t *testing.T) {
		got := decode(t, offloadhook.TypeCaseCompleted, `{}`).payload
		if !reflect.DeepEqual(got, &offloadhook.CaseCompleted{}) {
			t.Errorf("got %+v", got)
		}
	})
}

// driftKinds are what a field of a fixture may turn into. The texts in them must never come up in an error.
var driftKinds = map[string]string{
	"absent":  "",
	"null":    "null",
	"boolean": "true",
	"integer": "98765",
	"decimal": "98765.5",
	"huge":    "98765432109876543210",
	"string":  `"drifted"`,
	"array":   `["drifted",98765]`,
	"object":  `{"drifted":98765}`,
}

var driftContent = regexp.MustCompile(`drifted|98765`)

// driftFits holds for each field of data what its struct takes. A field that is not here takes everything.
var driftFits = map[string]string{
	"data": "object",

	"data.caseId":             "absent null string",
	"data.clientReferenceId":  "absent null string",
	"data.status":             "absent null string",
	"data.channel":            "absent null string",
	"data.attemptCount":       "absent null integer",
	"data.resultStatus":       "absent null string",
	"data.failureReason":      "absent null string",
	"data.inputRequest":       "absent null string",
	"data.inputRequestId":     "absent null string",
	"data.inputRequestStatus": "absent null string",
	"data.inputRequestedAt":   "absent null integer",
	"data.attachments":        "absent null",

	"data.attachments[]":              "absent null object",
	"data.attachments[].attachmentId": "absent null string",
	"data.attachments[].name":         "absent null string",
	"data.attachments[].size":         "absent null integer",
	"data.attachments[].type":         "absent null string",
	"data.attachments[].messageId":    "absent null string",
	"data.attachments[].inboxId":      "absent null string",
	"data.attachments[].receivedAt":   "absent null integer",
}

// TestDrift replaces every value of every fixture, the envelope's and the payload's at any depth, by every kind of
// JSON: no event is refused for it, or dropped in silence (promise 6).
func TestDrift(t *testing.T) {
	visited := make(map[string]bool)
	for _, f := range fixtures {
		var doc map[string]any
		unmarshal(t, readFixture(t, f.file), &doc)
		eachValue("", doc, func(path string, set func(replacement string)) {
			visited[path] = true
			t.Run(f.file+"/"+path, func(t *testing.T) {
				for _, kind := range slices.Sorted(maps.Keys(driftKinds)) {
					set(driftKinds[kind])
					body, err := json.Marshal(doc)
					if err != nil {
						t.Fatal(err)
					}
					t.Run(kind, func(t *testing.T) { testDrift(t, body, path, kind, nameOf(f.data)) })
				}
			})
		})
	}
	for path := range driftFits {
		if !visited[path] {
			t.Errorf("no fixture has %s", path)
		}
	}
	for _, path := range []string{"event_id", "event_type", "timestamp", "data.metadata.vendorId", "data.result"} {
		if !visited[path] {
			t.Errorf("%s was not replaced", path)
		}
	}
}

func testDrift(t *testing.T, body []byte, path, kind, typed string) {
	fits, limited := driftFits[path]
	known := path != "event_type"
	fitting := !limited || slices.Contains(strings.Fields(fits), kind)

	tr := newTrace()
	fresh, err := tr.deliver(t, tr.callbacks(), body)
	if path == "event_id" && kind != "string" {
		if !errors.Is(err, offloadhook.ErrMalformed) {
			t.Errorf("Deliver = %v, %v", fresh, err)
		}
		return
	}
	if !fresh || err != nil {
		t.Fatalf("Deliver = %v, %v", fresh, err)
	}
	call := tr.onlyCall(t)
	want := "Other"
	if known && fitting {
		want = typed
	}
	if call.name != want {
		t.Errorf("%s was called, want %s", call.name, want)
	}
	if !bytes.Equal(call.env.Raw, body) || !bytes.Equal(call.env.Data, member(t, body, "data")) {
		t.Errorf("Raw = %s, Data = %s, of %s", call.env.Raw, call.env.Data, body)
	}
	wantTime := offloadhook.Millis(0)
	if kind == "integer" {
		wantTime = 98765
	}
	if got := call.env.Timestamp; path == "timestamp" && got != wantTime {
		t.Errorf("Timestamp = %d, want %d", got, wantTime)
	}
	handled := tr.wantOutcomes(t, offloadhook.Accepted, offloadhook.Handled)
	if drifted := known && !fitting; (handled.Err != nil) != drifted {
		t.Errorf("observed %v", handled.Err)
	}

	// With Other nil, what no callback can take is reported, with its bytes.
	tr = newTrace()
	cb := tr.callbacks()
	cb.Other = nil
	if fresh, err := tr.deliver(t, cb, body); !fresh || err != nil {
		t.Fatalf("with Other nil, Deliver = %v, %v", fresh, err)
	}
	outcome := offloadhook.Handled
	switch {
	case !known:
		outcome = offloadhook.Ignored
	case !fitting:
		outcome = offloadhook.GaveUp
	}
	last := tr.wantOutcomes(t, offloadhook.Accepted, outcome)
	if calls := len(tr.calls); (calls == 1) != (outcome == offloadhook.Handled) {
		t.Errorf("with Other nil, %d calls", calls)
	}
	if (last.Err != nil) != (outcome == offloadhook.GaveUp) || last.Envelope == nil || !bytes.Equal(last.Body, body) {
		t.Errorf("with Other nil, observed %+v", last)
	}
}

// eachValue calls visit for each value inside v, with a function that replaces it by some JSON, or takes it away where
// that is empty and v is an object. The value is put back afterwards.
func eachValue(path string, v any, visit func(path string, set func(string))) {
	switch v := v.(type) {
	case map[string]any:
		for _, key := range slices.Sorted(maps.Keys(v)) {
			old, path := v[key], strings.TrimPrefix(path+"."+key, ".")
			visit(path, func(replacement string) {
				v[key] = json.RawMessage(replacement)
				if replacement == "" {
					delete(v, key)
				}
			})
			v[key] = old
			eachValue(path, old, visit)
		}
	case []any:
		for i, old := range v {
			visit(path+"[]", func(replacement string) {
				v[i] = old
				if replacement != "" {
					v[i] = json.RawMessage(replacement)
				}
			})
			v[i] = old
			eachValue(path+"[]", old, visit)
		}
	}
}

func TestNilCallback(t *testing.T) {
	body := readFixture(t, "case_failed_a")
	t.Run("Other takes it", func(t *testing.T) {
		tr := newTrace()
		cb := tr.callbacks()
		cb.CaseFailed = nil
		if _, err := tr.deliver(t, cb, body); err != nil {
			t.Fatal(err)
		}
		if call := tr.onlyCall(t); call.name != "Other" || !bytes.Equal(call.env.Raw, body) {
			t.Errorf("got %+v", call)
		}
		if o := tr.wantOutcomes(t, offloadhook.Accepted, offloadhook.Handled); o.Err != nil {
			t.Error(o.Err)
		}
	})
	t.Run("nothing takes it", func(t *testing.T) {
		tr := newTrace()
		if _, err := tr.deliver(t, offloadhook.Callbacks{}, body); err != nil {
			t.Fatal(err)
		}
		if o := tr.wantOutcomes(t, offloadhook.Accepted, offloadhook.Ignored); o.Err != nil {
			t.Error(o.Err)
		}
	})
}

// TestHostile delivers what cannot be an event: each body costs an answer and nothing else. The name of a file says
// what is wrong with it: those that begin with event_id are in order but for that.
func TestHostile(t *testing.T) {
	for _, path := range glob(t, "testdata/hostile/*.json") {
		name := strings.TrimSuffix(filepath.Base(path), ".json")
		t.Run(name, func(t *testing.T) {
			body := readFile(t, path)
			if _, ok := readEnvelope(body); ok != strings.HasPrefix(name, "event_id_") {
				t.Fatal("the file is not what its name says")
			}
			quoteless := func(text string) {
				t.Helper()
				for _, word := range regexp.MustCompile(`\w{2,}`).FindAllString(string(body), -1) {
					if word != "event_id" && word != "event" && strings.Contains(text, word) {
						t.Errorf("%q quotes the body", text)
					}
				}
			}
			malformed := func(err error) {
				t.Helper()
				if !errors.Is(err, offloadhook.ErrMalformed) {
					t.Errorf("err = %v", err)
				}
				quoteless(fmt.Sprint(err))
				if strings.Contains(fmt.Sprint(err), "event_id") != strings.HasPrefix(name, "event_id_") {
					t.Errorf("%v: that is not what is wrong with it", err)
				}
			}
			env, err := offloadhook.ParseEnvelope(body)
			if env != nil {
				t.Errorf("ParseEnvelope = %+v", env)
			}
			malformed(err)

			store := new(countingDeduper)
			tr := newTrace()
			fresh, err := tr.deliver(t, tr.callbacks(), body, offloadhook.WithDeduper(store))
			if fresh {
				t.Error("Deliver took it")
			}
			malformed(err)

			receiver := offloadhook.Handler(tr.callbacks(), tr.observer(), offloadhook.WithDeduper(store))
			answer := httptest.NewRecorder()
			receiver.ServeHTTP(answer, httptest.NewRequest(http.MethodPost, "/offload", bytes.NewReader(body)))
			if answer.Code != http.StatusBadRequest {
				t.Errorf("answered %d", answer.Code)
			}
			quoteless(answer.Body.String())
			shutdown(t, receiver)

			tr.wantOutcomes(t, offloadhook.Refused, offloadhook.Refused)
			for _, o := range tr.observed {
				if o.Envelope != nil || !bytes.Equal(o.Body, body) {
					t.Errorf("observed %+v", o)
				}
				malformed(o.Err)
			}
			if len(tr.calls) != 0 || store.calls != 0 {
				t.Errorf("%d callbacks, %d calls of the Deduper", len(tr.calls), store.calls)
			}
		})
	}
}

// TestStrangeButReal holds what no receiver would expect and none may refuse: a refused event is lost (promise 6).
func TestStrangeButReal(t *testing.T) {
	const completed = offloadhook.TypeCaseCompleted
	long := strings.Repeat("é", 127) + "x" // 255 bytes
	deep := strings.Repeat("[", 9_999) + strings.Repeat("]", 9_999)
	for _, tt := range []struct {
		name, body string
		id         string
		eventType  offloadhook.EventType
		timestamp  offloadhook.Millis
		data       string // "" for nil
	}{
		{"event_id alone", `{"event_id":"evt_1"}`, "evt_1", "", 0, ""},
		{"white space", " \t\r\n{ \t\r\n\"event_id\" \t\r\n: \t\r\n\"evt_1\" \t\r\n, \"data\" : \t[ \n] \r } \t\r\n",
			"evt_1", "", 0, "[ \n]"},

		{"keys escaped", `{"\u0065vent_id":"evt_1","event\u005ftype":"case.failed","tim\u0065stamp":5,"d\u0061ta":1}`,
			"evt_1", offloadhook.TypeCaseFailed, 5, "1"},
		{"keys of another case", `{"EVENT_ID":"x","event_id":"evt_1","Event_Id":2,"DATA":1,"Event_Type":"x"}`,
			"evt_1", "", 0, ""},
		{"keys with blanks", `{" event_id":"x","event_id":"evt_1","event_id ":"x","":"x","event_id\u0000":"x"}`,
			"evt_1", "", 0, ""},
		{"unknown keys, doubled", `{"v":1,"event_id":"evt_1","v":2,"next":{"event_id":1,"event_id":2}}`,
			"evt_1", "", 0, ""},
		{"key with a lone surrogate", `{"\ud800":1,"event_id":"evt_1"}`, "evt_1", "", 0, ""},
		{"key with bad UTF-8", "{\"\xff\":1,\"event_id\":\"evt_1\"}", "evt_1", "", 0, ""},
		{"event_id in data", `{"event_id":"evt_1","data":{"event_id":null,"event_id":""}}`,
			"evt_1", "", 0, `{"event_id":null,"event_id":""}`},

		{"id of 255 bytes", `{"event_id":"` + long + `"}`, long, "", 0, ""},
		{"id of 255 bytes, escaped", `{"event_id":"` + strings.Repeat(`\u0061`, 255) + `"}`,
			strings.Repeat("a", 255), "", 0, ""},
		{"id of one byte", `{"event_id":"0"}`, "0", "", 0, ""},
		{"id with blanks and marks", `{"event_id":" \"\\\/';<>|&%,` + "\u00a0\u2028" + ` "}`,
			" \"\\/';<>|&%,\u00a0\u2028 ", "", 0, ""},
		{"id with a surrogate pair", `{"event_id":"evt_\ud83d\ude00\uD83D\uDE00"}`, "evt_😀😀", "", 0, ""},
		{"id that spells an escape", `{"event_id":"evt_\\ud800"}`, `evt_\ud800`, "", 0, ""},
		{"id with U+FFFD", "{\"event_id\":\"evt_\ufffd\"}", "evt_\ufffd", "", 0, ""},
		{"id with U+FFFD, escaped", `{"event_id":"evt_\ufffd\uFFFD"}`, "evt_\ufffd\ufffd", "", 0, ""},

		{"event_type unknown", `{"event_id":"evt_1","event_type":"case.teleported"}`,
			"evt_1", "case.teleported", 0, ""},
		{"event_type escaped", `{"event_id":"evt_1","event_type":"case\u002ecompleted"}`, "evt_1", completed, 0, ""},
		{"event_type of another case", `{"event_id":"evt_1","event_type":"Case.Completed"}`,
			"evt_1", "Case.Completed", 0, ""},
		{"event_type empty", `{"event_id":"evt_1","event_type":""}`, "evt_1", "", 0, ""},
		{"event_type null", `{"event_id":"evt_1","event_type":null}`, "evt_1", "", 0, ""},
		{"event_type number", `{"event_id":"evt_1","event_type":1}`, "evt_1", "", 0, ""},
		{"event_type object", `{"event_id":"evt_1","event_type":{"event_type":"case.completed"}}`,
			"evt_1", "", 0, ""},
		{"event_type doubled", `{"event_id":"evt_1","event_type":1,"event_type":"case.completed"}`,
			"evt_1", completed, 0, ""},
		{"event_type doubled, string first", `{"event_id":"evt_1","event_type":"case.completed","event_type":[]}`,
			"evt_1", "", 0, ""},
		{"event_type with a lone surrogate", `{"event_id":"evt_1","event_type":"case\udc00"}`,
			"evt_1", "case\ufffd", 0, ""},
		{"event_type with bad UTF-8", "{\"event_id\":\"evt_1\",\"event_type\":\"case\xff\"}",
			"evt_1", "case\ufffd", 0, ""},

		{"timestamp negative", `{"event_id":"evt_1","timestamp":-1}`, "evt_1", "", -1, ""},
		{"timestamp the largest", `{"event_id":"evt_1","timestamp":9223372036854775807}`, "evt_1", "", 1<<63 - 1, ""},
		{"timestamp out of range", `{"event_id":"evt_1","timestamp":9223372036854775808}`, "evt_1", "", 0, ""},
		{"timestamp with a fraction", `{"event_id":"evt_1","timestamp":1774131900000.0}`, "evt_1", "", 0, ""},
		{"timestamp with an exponent", `{"event_id":"evt_1","timestamp":1774131900e3}`, "evt_1", "", 0, ""},
		{"timestamp string", `{"event_id":"evt_1","timestamp":"1774131900000"}`, "evt_1", "", 0, ""},
		{"timestamp ISO 8601", `{"event_id":"evt_1","timestamp":"2026-03-21T22:25:00Z"}`, "evt_1", "", 0, ""},
		{"timestamp null", `{"event_id":"evt_1","timestamp":null}`, "evt_1", "", 0, ""},
		{"timestamp object", `{"event_id":"evt_1","timestamp":{"ms":1}}`, "evt_1", "", 0, ""},
		{"timestamp doubled", `{"event_id":"evt_1","timestamp":1,"timestamp":2}`, "evt_1", "", 2, ""},
		{"timestamp doubled, integer first", `{"event_id":"evt_1","timestamp":1,"timestamp":"2"}`, "evt_1", "", 0, ""},

		{"data null", `{"event_id":"evt_1","data":null}`, "evt_1", "", 0, "null"},
		{"data string", `{"event_id":"evt_1","data":"}"}`, "evt_1", "", 0, `"}"`},
		{"data number", `{"event_id":"evt_1","data":-1.50E+400}`, "evt_1", "", 0, "-1.50E+400"},
		{"data array", `{"event_id":"evt_1","data":[{},[]]}`, "evt_1", "", 0, "[{},[]]"},
		{"data doubled", `{"data":{"a":1},"event_id":"evt_1","data":{"b":2}}`, "evt_1", "", 0, `{"b":2}`},
		{"data doubled, object first", `{"data":{"a":1},"event_id":"evt_1","data":null}`, "evt_1", "", 0, "null"},
		{"data with lone surrogates", `{"event_id":"evt_1","data":["\ud800","\udc00\ud800","\ud83dx"]}`,
			"evt_1", "", 0, `["\ud800","\udc00\ud800","\ud83dx"]`},
		{"data with bad UTF-8", "{\"event_id\":\"evt_1\",\"data\":[\"\xff\xc0\xaf\xed\xa0\x80\"]}",
			"evt_1", "", 0, "[\"\xff\xc0\xaf\xed\xa0\x80\"]"},
		{"data with control characters", `{"event_id":"evt_1","data":"\u0000\u001b` + "\x7f\u0085" + `"}`,
			"evt_1", "", 0, `"\u0000\u001b` + "\x7f\u0085" + `"`},
		{"10,000 deep", `{"event_id":"evt_1","data":` + deep + `}`, "evt_1", "", 0, deep},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var data json.RawMessage
			if tt.data != "" {
				data = json.RawMessage(tt.data)
			}
			tr := newTrace()
			cb := offloadhook.Callbacks{Other: tr.callbacks().Other}
			if fresh, err := tr.deliver(t, cb, []byte(tt.body)); !fresh || err != nil {
				t.Fatalf("Deliver = %v, %v", fresh, err)
			}
			want := &offloadhook.Envelope{
				EventID: tt.id, EventType: tt.eventType, Timestamp: tt.timestamp, Data: data, Raw: []byte(tt.body),
			}
			if got := tr.onlyCall(t).env; !reflect.DeepEqual(got, want) {
				t.Errorf("\n got %+v\nwant %+v", got, want)
			}
		})
	}
}

// TestSyntax takes every short text over the marks that JSON is made of, and expects of the parser what encoding/json
// says.
func TestSyntax(t *testing.T) {
	for _, tt := range []struct {
		name, prefix, alphabet, suffix string
		length                         int
	}{
		{"structure", ``, `{}[]":,;1`, ``, 5},
		{"structure in an array", `[1`, `{}[]":,;1`, `]`, 5},
		{"structure in an object", `{"a":1`, `{}[]":,;1`, `}`, 5},
		{"numbers", ``, `-+.eE019`, ``, 5},
		{"strings", `"`, "\\\"u09afAFGgx/\x1f \x80", `"`, 4},
		{"escapes", `"\u00`, "\\\"u09afAFGgx/\x1f \x80", `"`, 4},
		{"words", ``, `nultrefasT`, ``, 5},
	} {
		t.Run(tt.name, func(t *testing.T) {
			const head = `{"event_id":"evt_1","data":`
			for text := range texts(tt.alphabet, tt.length) {
				body := []byte(head + tt.prefix + text + tt.suffix + `}`)
				if _, err := offloadhook.ParseEnvelope(body); (err == nil) != json.Valid(body) {
					t.Fatalf("%q: %v", body, err)
				}
			}
		})
	}
}

// TestDeepBodyTakesNoStack: a short body must not leave a large stack with the goroutine of each connection.
func TestDeepBodyTakesNoStack(t *testing.T) {
	const goroutines = 100
	for _, deep := range []string{"[", `{"a":`} {
		body := []byte(strings.Repeat(deep, 10_001))
		var before, after runtime.MemStats
		var parsed, ended sync.WaitGroup
		release := make(chan bool)
		runtime.ReadMemStats(&before)
		for range goroutines {
			parsed.Add(1)
			ended.Go(func() {
				if _, err := offloadhook.ParseEnvelope(body); err == nil {
					t.Error("no error")
				}
				parsed.Done()
				<-release
			})
		}
		parsed.Wait()
		runtime.ReadMemStats(&after)
		close(release)
		ended.Wait()
		if each := (int64(after.StackInuse) - int64(before.StackInuse)) / goroutines; each > 64<<10 {
			t.Errorf("a body of %q, over and over: %d bytes of stack for each goroutine", deep, each)
		}
	}
}

// texts yields every text over alphabet of up to length bytes.
func texts(alphabet string, length int) iter.Seq[string] {
	return func(yield func(string) bool) {
		layer := []string{""}
		for n := 0; ; n++ {
			var next []string
			for _, text := range layer {
				if !yield(text) {
					return
				}
				for i := 0; n < length && i < len(alphabet); i++ {
					next = append(next, text+alphabet[i:i+1])
				}
			}
			if layer = next; len(layer) == 0 {
				return
			}
		}
	}
}

// FuzzParseEnvelope lets encoding/json judge what ParseEnvelope takes and refuses.
func FuzzParseEnvelope(f *testing.F) {
	for _, pattern := range []string{"testdata/*.json", "testdata/hostile/*.json"} {
		for _, path := range glob(f, pattern) {
			if body := readFile(f, path); len(body) < 4096 { // the deep ones would slow it to a crawl
				f.Add(body)
			}
		}
	}
	f.Add([]byte(`{"\u0065vent_id":"evt_\ud83d\ude00\ufffd","EVENT_ID":1,"data":1,"data":{"a":[-1.5e+3,true]}}`))
	f.Fuzz(func(t *testing.T, body []byte) {
		before := bytes.Clone(body)
		env, err := offloadhook.ParseEnvelope(body)
		if !bytes.Equal(body, before) {
			t.Error("the body was changed")
		}
		want, reason := judge(body)
		switch {
		case reason != "":
			if !errors.Is(err, offloadhook.ErrMalformed) || env != nil {
				t.Errorf("ParseEnvelope = %+v, %v, though %s", env, err, reason)
			}
		case err != nil:
			t.Errorf("refused without a reason: %v", err)
		case !reflect.DeepEqual(env, want):
			t.Errorf("\n got %+v\nwant %+v", env, want)
		case &env.Raw[0] != &body[0]:
			t.Error("the body was copied")
		}
	})
}

// judge reads body as the documentation says it is read, with encoding/json alone: slowly. It returns the reason for
// which body is to be refused, or the envelope.
func judge(body []byte) (env *offloadhook.Envelope, refusal string) {
	members, ok := readEnvelope(body)
	if !ok {
		return nil, "it is not exactly one JSON object"
	}
	ids := members["event_id"]
	if len(ids) != 1 {
		return nil, fmt.Sprintf("it has %d event_ids", len(ids))
	}
	env = &offloadhook.Envelope{Raw: body}
	var id *string // stays nil for null
	if json.Unmarshal(ids[0], &id) != nil || id == nil {
		return nil, "event_id is not a string"
	}
	env.EventID = *id
	switch {
	case *id == "":
		return nil, "event_id is empty"
	case len(*id) > 255:
		return nil, "event_id is too long"
	case strings.ContainsFunc(*id, unicode.IsControl):
		return nil, "event_id has control characters"
	case !utf8.Valid(ids[0]):
		return nil, "event_id has bad UTF-8"
	}
	// encoding/json turns each lone surrogate into a U+FFFD that the text does not spell.
	spelled := bytes.Count(ids[0], []byte("\ufffd"))
	for _, escape := range regexp.MustCompile(`\\(u....|.)`).FindAll(ids[0], -1) {
		if strings.EqualFold(string(escape), `\ufffd`) {
			spelled++
		}
	}
	if strings.Count(*id, "\ufffd") > spelled {
		return nil, "event_id has a lone surrogate"
	}
	last := func(name string) json.RawMessage {
		if values := members[name]; len(values) > 0 {
			return values[len(values)-1]
		}
		return nil
	}
	// A failed Unmarshal may leave something behind.
	if json.Unmarshal(last("event_type"), &env.EventType) != nil {
		env.EventType = ""
	}
	if json.Unmarshal(last("timestamp"), &env.Timestamp) != nil {
		env.Timestamp = 0
	}
	env.Data = last("data")
	return env, ""
}

// readEnvelope returns the members of the object that body is, by their exact names, and whether it is one.
func readEnvelope(body []byte) (members map[string][]json.RawMessage, ok bool) {
	if !json.Valid(body) {
		return nil, false
	}
	dec := json.NewDecoder(bytes.NewReader(body))
	if open, err := dec.Token(); err != nil || open != json.Delim('{') {
		return nil, false
	}
	members = make(map[string][]json.RawMessage)
	for dec.More() {
		key, err := dec.Token()
		var value json.RawMessage
		if err == nil {
			err = dec.Decode(&value)
		}
		if err != nil {
			panic(err) // json.Valid has seen it
		}
		members[key.(string)] = append(members[key.(string)], value)
	}
	return members, true
}

func TestEventID(t *testing.T) {
	for _, tt := range []struct {
		caseID    string
		eventType offloadhook.EventType
		updatedAt offloadhook.Millis
		want      string
	}{
		{"case_123", offloadhook.TypeCaseFailed, 1774131900000, "evt_case_123_case_failed_1774131900000"},
		{"a.b", "case.over.all", 0, "evt_a.b_case_over_all_0"},
		{"", "", -1, "evt___-1"},
	} {
		if got := offloadhook.EventID(tt.caseID, tt.eventType, tt.updatedAt); got != tt.want {
			t.Errorf("got %q, want %q", got, tt.want)
		}
	}
	for _, f := range fixtures {
		caseID := reflect.ValueOf(f.data).Elem().FieldByName("CaseID").String()
		if got := offloadhook.EventID(caseID, f.env.EventType, f.env.Timestamp); got != f.env.EventID {
			t.Errorf("%s: got %q, want %q", f.file, got, f.env.EventID)
		}
	}
}

func TestConstantsAreWhatOffloadSends(t *testing.T) {
	got := []any{
		offloadhook.TypeCaseCompleted, offloadhook.TypeCaseFailed, offloadhook.TypeCaseInputNeeded,
		offloadhook.StatusCreated, offloadhook.StatusRunning, offloadhook.StatusInputNeeded,
		offloadhook.StatusCompleted, offloadhook.StatusFailed,
		offloadhook.ResultGoalAchieved, offloadhook.ResultMaxRetries, offloadhook.ResultFailedRejected,
		offloadhook.ResultBounced, offloadhook.ResultComplained, offloadhook.ResultRejected,
	}
	want := "[case.completed case.failed case.input_needed CREATED RUNNING INPUT_NEEDED COMPLETED FAILED " +
		"goal_achieved max_retries failed_rejected BOUNCED COMPLAINED REJECTED]"
	if fmt.Sprint(got) != want {
		t.Errorf("got %v, want %s", got, want)
	}
}

func TestMillisTime(t *testing.T) {
	for _, tt := range []struct {
		ms   offloadhook.Millis
		want time.Time
	}{
		{0, time.Time{}},
		{1, time.Date(1970, 1, 1, 0, 0, 0, 1e6, time.UTC)},
		{-1, time.Date(1969, 12, 31, 23, 59, 59, 999e6, time.UTC)},
		{1774131900300, time.Date(2026, 3, 21, 22, 25, 0, 300e6, time.UTC)},
	} {
		if got := tt.ms.Time(); got != tt.want {
			t.Errorf("Millis(%d).Time() = %v, want %v", tt.ms, got, tt.want)
		}
	}
}

// TestFixturesAreLinkedOnlyWhereUsed builds a program of each kind outside of this module, and one against a vendored
// copy.
func TestFixturesAreLinkedOnlyWhereUsed(t *testing.T) {
	if testing.Short() {
		t.Skip("builds three programs")
	}
	dir := userModule(t, map[string]string{
		"without/main.go": `package main

import (
	"net/http"

	"offloadhook"
)

func main() { http.Handle("/offload", offloadhook.Handler(offloadhook.Callbacks{})) }
`,
		"with/main.go": `package main

import (
	"os"

	"offloadhook"
)

func main() {
	body, err := offloadhook.Fixtures.ReadFile("testdata/case_completed_b.json")
	if err != nil {
		panic(err)
	}
	os.Stdout.Write(body)
}
`,
	})
	run := func(flags, name string, args ...string) []byte {
		t.Helper()
		cmd := exec.CommandContext(t.Context(), name, args...)
		cmd.Dir = dir
		cmd.Env = append(os.Environ(), "GOFLAGS="+flags, "GOWORK=off", "GOPROXY=off", "GOTOOLCHAIN=local")
		var stderr strings.Builder
		cmd.Stderr = &stderr
		out, err := cmd.Output()
		if err != nil {
			t.Fatalf("%s %v: %v\n%s", name, args, err, &stderr)
		}
		return out
	}
	build := func(flags, pkg string) (path string, holds int) {
		t.Helper()
		path = filepath.Join(dir, "program")
		if runtime.GOOS == "windows" {
			path += ".exe"
		}
		run(flags, "go", "build", "-o", path, pkg)
		program := readFile(t, path)
		for _, f := range fixtures {
			if bytes.Contains(program, readFixture(t, f.file)) {
				holds++
			}
		}
		return path, holds
	}

	if _, holds := build("-mod=mod", "./without"); holds != 0 {
		t.Errorf("without Fixtures, the program carries %d of them", holds)
	}
	for _, flags := range []string{"-mod=mod", "-mod=vendor"} {
		if flags == "-mod=vendor" {
			run("", "go", "mod", "vendor")
		}
		path, holds := build(flags, "./with")
		if holds != len(fixtures) {
			t.Errorf("%s: with Fixtures, the program carries %d of %d", flags, holds, len(fixtures))
		}
		if got := run("", path); !bytes.Equal(got, readFixture(t, "case_completed_b")) {
			t.Errorf("%s: the program read %q", flags, got)
		}
	}
}

// userModule makes a module that uses this one, and returns its directory.
func userModule(t *testing.T, files map[string]string) (dir string) {
	t.Helper()
	dir = t.TempDir()
	// A copy, since a path with a space cannot be vendored, and on Windows a link takes a privilege.
	for _, pattern := range []string{"go.mod", "*.go", "testdata/*.json"} {
		names, err := filepath.Glob(pattern)
		if err != nil {
			t.Fatal(err)
		}
		for _, name := range names {
			files["offloadhook/"+name] = string(readFile(t, name))
		}
	}
	files["go.mod"] = "module user\n\ngo 1.25\n\nrequire offloadhook v0.0.0\n\nreplace offloadhook => ./offloadhook\n"
	for name, text := range files {
		path := filepath.Join(dir, filepath.FromSlash(name))
		err := os.MkdirAll(filepath.Dir(path), 0o700)
		if err = errors.Join(err, os.WriteFile(path, []byte(text), 0o600)); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// TestREADME holds the README's Go against the compiler, its mount against ExampleHandler, and its links against the tree.
func TestREADME(t *testing.T) {
	readme, err := os.ReadFile("README.md")
	if err != nil {
		t.Fatal(err)
	}
	source, err := os.ReadFile("events_test.go")
	if err != nil {
		t.Fatal(err)
	}
	blocks := regexp.MustCompile("(?s)```go\n(.*?)```").FindAllStringSubmatch(string(readme), -1)
	if len(blocks) != 3 {
		t.Fatalf("%d blocks of Go, want the mount, a main and a test", len(blocks))
	}
	mount := "\t" + strings.ReplaceAll(strings.TrimSpace(blocks[0][1]), "\n", "\n\t") + "\n"
	if _, example, _ := strings.Cut(string(source), "func ExampleHandler() {"); !strings.Contains(example, mount) {
		t.Errorf("ExampleHandler does not have the README's\n%s", mount)
	}
	if at := strings.Count(string(readme[:bytes.Index(readme, []byte("mux.Handle"))]), "\n"); at >= 30 {
		t.Errorf("the mount is at line %d", at+1)
	}
	for _, link := range regexp.MustCompile(`\]\(([^)#:]+)\)`).FindAllStringSubmatch(string(readme), -1) {
		if _, err := os.Stat(link[1]); err != nil {
			t.Error(err)
		}
	}
	cmd := exec.CommandContext(t.Context(), "go", "test", ".")
	cmd.Dir = userModule(t, map[string]string{
		"main.go":      blocks[1][1],
		"main_test.go": "package main\n\nimport (\n\"context\"\n\"testing\"\n\n\"offloadhook\"\n)\n\n" + blocks[2][1],
	})
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("%v\n%s", err, out)
	}
}

func TestInvalidOptionPanics(t *testing.T) {
	for _, tt := range []struct {
		name  string
		opt   func() offloadhook.Option
		valid bool
	}{
		{"WithDeduper(nil)", func() offloadhook.Option { return offloadhook.WithDeduper(nil) }, false},
		{"WithDeduper(an Inbox)", func() offloadhook.Option {
			return offloadhook.WithDeduper(struct{ offloadhook.Inbox }{})
		}, false},
		{"WithDeduper(Memory)", func() offloadhook.Option {
			return offloadhook.WithDeduper(new(offloadhook.Memory))
		}, true},
		{"WithInbox(nil)", func() offloadhook.Option { return offloadhook.WithInbox(nil) }, false},
		{"WithToken()", func() offloadhook.Option { return offloadhook.WithToken() }, false},
		{"WithToken(empty)", func() offloadhook.Option { return offloadhook.WithToken("") }, false},
		{"WithToken(empty among others)", func() offloadhook.Option { return offloadhook.WithToken("a", "") }, false},
		{"WithToken(a)", func() offloadhook.Option { return offloadhook.WithToken("a") }, true},
		{"WithConcurrency(0)", func() offloadhook.Option { return offloadhook.WithConcurrency(0) }, false},
		{"WithConcurrency(-1)", func() offloadhook.Option { return offloadhook.WithConcurrency(-1) }, false},
		{"WithConcurrency(1)", func() offloadhook.Option { return offloadhook.WithConcurrency(1) }, true},
		{"WithBacklog(0)", func() offloadhook.Option { return offloadhook.WithBacklog(0) }, false},
		{"WithBacklog(1)", func() offloadhook.Option { return offloadhook.WithBacklog(1) }, true},
		{"WithRetry(0, 1s)", func() offloadhook.Option { return offloadhook.WithRetry(0, time.Second) }, false},
		{"WithRetry(1, -1ns)", func() offloadhook.Option { return offloadhook.WithRetry(1, -1) }, false},
		{"WithRetry(1, 0)", func() offloadhook.Option { return offloadhook.WithRetry(1, 0) }, true},
		{"WithMaxBodyBytes(0)", func() offloadhook.Option { return offloadhook.WithMaxBodyBytes(0) }, false},
		{"WithMaxBodyBytes(1)", func() offloadhook.Option { return offloadhook.WithMaxBodyBytes(1) }, true},
		{"WithObserver(nil)", func() offloadhook.Option { return offloadhook.WithObserver(nil) }, false},
		{"WithFailClosed()", offloadhook.WithFailClosed, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			defer func() {
				message := recover()
				if tt.valid {
					if message != nil {
						t.Errorf("panicked: %v", message)
					}
					return
				}
				option, _, _ := strings.Cut(tt.name, "(")
				if !strings.HasPrefix(fmt.Sprint(message), "offloadhook: "+option+" ") {
					t.Errorf("recovered %v", message)
				}
			}()
			shutdown(t, offloadhook.Handler(offloadhook.Callbacks{}, tt.opt()))
		})
	}
}

// Everything down to mux.Handle stands in the README.
func ExampleHandler() {
	mux := http.NewServeMux()

	cb := offloadhook.Callbacks{
		CaseCompleted: func(ctx context.Context, env *offloadhook.Envelope, c *offloadhook.CaseCompleted) error {
			fmt.Printf("case %s: %s\n", c.CaseID, c.ResultStatus)
			return nil
		},
	}
	mux.Handle("/offload", offloadhook.Handler(cb))

	body, _ := offloadhook.Fixtures.ReadFile("testdata/case_completed_a.json")
	req := httptest.NewRequest("POST", "/offload", bytes.NewReader(body))
	answer := httptest.NewRecorder()
	mux.ServeHTTP(answer, req)
	handler, _ := mux.Handler(req)
	handler.(*offloadhook.Receiver).Shutdown(context.Background()) // waits for the callback
	fmt.Println(answer.Code)
	// Output:
	// case case_123: goal_achieved
	// 202
}

// A 2xx is a promise: an event that got one outlives the process that gave it.
func Example_crash() {
	dir, _ := os.MkdirTemp("", "offload")
	defer os.RemoveAll(dir)
	body, _ := offloadhook.Fixtures.ReadFile("testdata/case_input_needed_b.json")

	journal, _ := offloadhook.OpenJournal(dir, 0)
	running := make(chan struct{})
	doomed := offloadhook.Handler(offloadhook.Callbacks{
		CaseInputNeeded: func(ctx context.Context, _ *offloadhook.Envelope, _ *offloadhook.CaseInputNeeded) error {
			close(running)
			<-ctx.Done()
			return ctx.Err()
		},
	}, offloadhook.WithInbox(journal), offloadhook.WithObserver(func(context.Context, offloadhook.Observation) {}))
	fresh, err := doomed.Deliver(context.Background(), body)
	fmt.Println("accepted:", fresh, err)
	<-running // in the middle of its callback this receiver is abandoned, as if its process were killed

	journal, _ = offloadhook.OpenJournal(dir, 0)
	handled := make(chan string)
	receiver := offloadhook.Handler(offloadhook.Callbacks{
		CaseInputNeeded: func(_ context.Context, _ *offloadhook.Envelope, c *offloadhook.CaseInputNeeded) error {
			handled <- c.InputRequestID
			return nil
		},
	}, offloadhook.WithInbox(journal))
	fmt.Println("handled by the next one:", <-handled)
	receiver.Shutdown(context.Background())

	over, cancel := context.WithCancel(context.Background())
	cancel()
	doomed.Shutdown(over)
	// Output:
	// accepted: true <nil>
	// handled by the next one: c8c6a7ca-a913-4d13-8cd8-5887efb0531c
}

// A unit test of a callback needs no server: Deliver an example event, then Shutdown, which waits for the callback.
func ExampleReceiver_Deliver() {
	receiver := offloadhook.Handler(offloadhook.Callbacks{
		CaseInputNeeded: func(ctx context.Context, env *offloadhook.Envelope, c *offloadhook.CaseInputNeeded) error {
			fmt.Println(c.InputRequestID, c.InputRequest)
			return nil
		},
	})
	body, _ := offloadhook.Fixtures.ReadFile("testdata/case_input_needed_a.json")
	fresh, err := receiver.Deliver(context.Background(), body)
	receiver.Shutdown(context.Background())
	fmt.Println(fresh, err)
	// Output:
	// input-request-123 The counterparty asked whether a Tuesday deadline is acceptable.
	// true <nil>
}

func ExampleParseEnvelope() {
	env, err := offloadhook.ParseEnvelope([]byte(`{
		"event_id": "evt_case_123_case_failed_1774131900000",
		"event_type": "case.failed",
		"timestamp": 1774131900000,
		"data": {"caseId": "case_123"}
	}`))
	fmt.Println(env.EventType, env.Timestamp.Time(), string(env.Data), err)

	_, err = offloadhook.ParseEnvelope([]byte(`{"event_type": "case.failed"}`))
	fmt.Println(errors.Is(err, offloadhook.ErrMalformed), err)
	// Output:
	// case.failed 2026-03-21 22:25:00 +0000 UTC {"caseId": "case_123"} <nil>
	// true offloadhook: malformed event: event_id is missing
}

// A poller that reads a case can tell the id of the event that Offload sent for it.
func ExampleEventID() {
	fmt.Println(offloadhook.EventID("case_123", offloadhook.TypeCaseCompleted, 1774131900000))
	// Output: evt_case_123_case_completed_1774131900000
}

// While a token is being changed, both are accepted.
func ExampleWithToken() {
	receiver := offloadhook.Handler(offloadhook.Callbacks{}, offloadhook.WithToken("new-secret", "old-secret"))
	defer receiver.Shutdown(context.Background())
	server := httptest.NewServer(receiver)
	defer server.Close()

	for _, query := range []string{"", "?token=guess", "?token=old-secret", "?token=new-secret"} {
		body := strings.NewReader(`{"event_id": "evt_1", "event_type": "case.failed", "data": {}}`)
		resp, err := http.Post(server.URL+query, "application/json", body)
		if err != nil {
			fmt.Println(err)
			return
		}
		resp.Body.Close()
		fmt.Println(resp.StatusCode)
	}
	// Output:
	// 401
	// 401
	// 202
	// 200
}

// Offload does not send again, so keep the bytes of what was refused or given up.
func ExampleWithObserver() {
	receiver := offloadhook.Handler(offloadhook.Callbacks{},
		offloadhook.WithObserver(func(_ context.Context, o offloadhook.Observation) {
			switch o.Outcome {
			case offloadhook.Refused, offloadhook.GaveUp, offloadhook.Unfinished:
				fmt.Printf("%s: %v: %s\n", o.Outcome, o.Err, o.Body)
			}
		}))
	defer receiver.Shutdown(context.Background())
	receiver.Deliver(context.Background(), []byte(`{"event_type": "case.failed"}`))
	// Output:
	// refused: offloadhook: malformed event: event_id is missing: {"event_type": "case.failed"}
}

// trace records what became of the events given to deliver.
type trace struct {
	mu       sync.Mutex // protects what follows until Shutdown has returned
	calls    []call
	observed []offloadhook.Observation
}

type call struct {
	name    string // of the field of Callbacks
	env     *offloadhook.Envelope
	payload any // nil for Other
}

func newTrace() *trace { return new(trace) }

func (tr *trace) called(name string, env *offloadhook.Envelope, payload any) error {
	tr.mu.Lock()
	defer tr.mu.Unlock()
	tr.calls = append(tr.calls, call{name, env, payload})
	return nil
}

// callbacks returns callbacks that record their calls; none is nil.
func (tr *trace) callbacks() offloadhook.Callbacks {
	return offloadhook.Callbacks{
		CaseCompleted: func(_ context.Context, env *offloadhook.Envelope, c *offloadhook.CaseCompleted) error {
			return tr.called("CaseCompleted", env, c)
		},
		CaseFailed: func(_ context.Context, env *offloadhook.Envelope, c *offloadhook.CaseFailed) error {
			return tr.called("CaseFailed", env, c)
		},
		CaseInputNeeded: func(_ context.Context, env *offloadhook.Envelope, c *offloadhook.CaseInputNeeded) error {
			return tr.called("CaseInputNeeded", env, c)
		},
		Other: func(_ context.Context, env *offloadhook.Envelope) error {
			return tr.called("Other", env, nil)
		},
	}
}

func (tr *trace) observer() offloadhook.Option {
	return offloadhook.WithObserver(func(_ context.Context, o offloadhook.Observation) {
		tr.mu.Lock()
		defer tr.mu.Unlock()
		tr.observed = append(tr.observed, o)
	})
}

// deliver gives body to a new receiver and returns when everything has come of it that will.
func (tr *trace) deliver(
	t *testing.T, cb offloadhook.Callbacks, body []byte, opts ...offloadhook.Option,
) (fresh bool, err error) {
	t.Helper()
	receiver := offloadhook.Handler(cb, append(opts, tr.observer())...)
	fresh, err = receiver.Deliver(t.Context(), body)
	shutdown(t, receiver)
	return fresh, err
}

func (tr *trace) onlyCall(t *testing.T) call {
	t.Helper()
	if len(tr.calls) != 1 {
		t.Fatalf("%d callbacks were called: %+v", len(tr.calls), tr.calls)
	}
	return tr.calls[0]
}

// wantOutcomes checks what was observed, that no error quotes the drift, and returns the last observation.
func (tr *trace) wantOutcomes(t *testing.T, want ...offloadhook.Outcome) offloadhook.Observation {
	t.Helper()
	var got []offloadhook.Outcome
	for _, o := range tr.observed {
		got = append(got, o.Outcome)
		if o.Err != nil && driftContent.MatchString(o.Err.Error()) {
			t.Errorf("%q quotes the payload", o.Err)
		}
	}
	if slices.Sort(got); !slices.Equal(got, slices.Sorted(slices.Values(want))) {
		t.Fatalf("observed %v, want %v", tr.observed, want)
	}
	// The callback may be over before Accepted is observed.
	i := slices.IndexFunc(tr.observed, func(o offloadhook.Observation) bool { return o.Outcome == want[len(want)-1] })
	return tr.observed[i]
}

// countingDeduper counts the calls of either method.
type countingDeduper struct{ calls int }

func (d *countingDeduper) Claim(context.Context, *offloadhook.Envelope) (bool, error) {
	d.calls++
	return true, nil
}

func (d *countingDeduper) Done(context.Context, *offloadhook.Envelope, error) error {
	d.calls++
	return nil
}

func shutdown(t *testing.T, receiver *offloadhook.Receiver) {
	t.Helper()
	if err := receiver.Shutdown(t.Context()); err != nil {
		t.Fatal(err)
	}
}

// nameOf returns the name of the callback that takes a payload like p.
func nameOf(p any) string { return reflect.TypeOf(p).Elem().Name() }

// compacted takes the white space out of the raw JSON in p, a pointer to a payload.
func compacted(t *testing.T, p any) any {
	t.Helper()
	compact := func(raw *json.RawMessage) {
		if *raw == nil {
			return
		}
		var buf bytes.Buffer
		if err := json.Compact(&buf, *raw); err != nil {
			t.Fatal(err)
		}
		*raw = buf.Bytes()
	}
	switch p := p.(type) {
	case *offloadhook.CaseCompleted:
		compact(&p.Result)
		compact(&p.Metadata)
	case *offloadhook.CaseFailed:
		compact(&p.Metadata)
	case *offloadhook.CaseInputNeeded:
		compact(&p.Metadata)
	}
	return p
}

// sameJSON reports whether a and b mean the same, every digit of a number included.
func sameJSON(t *testing.T, a, b []byte) bool {
	t.Helper()
	var values [2]any
	for i, text := range [][]byte{a, b} {
		dec := json.NewDecoder(bytes.NewReader(text))
		dec.UseNumber()
		if err := dec.Decode(&values[i]); err != nil {
			t.Fatalf("%v: %s", err, text)
		}
	}
	return reflect.DeepEqual(values[0], values[1])
}

func member(t *testing.T, object []byte, name string) json.RawMessage {
	t.Helper()
	var members map[string]json.RawMessage
	unmarshal(t, object, &members)
	return members[name]
}

func unmarshal(t *testing.T, data []byte, v any) {
	t.Helper()
	if err := json.Unmarshal(data, v); err != nil {
		t.Fatalf("%v: %s", err, data)
	}
}

func readFixture(tb testing.TB, name string) []byte {
	tb.Helper()
	body, err := offloadhook.Fixtures.ReadFile("testdata/" + name + ".json")
	if err != nil {
		tb.Fatal(err)
	}
	return body
}

func readFile(tb testing.TB, path string) []byte {
	tb.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		tb.Fatal(err)
	}
	return data
}

func glob(tb testing.TB, pattern string) []string {
	tb.Helper()
	paths, err := filepath.Glob(pattern)
	if err != nil || len(paths) == 0 {
		tb.Fatalf("%s: %d files, %v", pattern, len(paths), err)
	}
	return paths
}
