package cluster

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"time"
)

// auditPolicy logs who asked for what, never a body, and leaves out the probes
// and the schema downloads, which nobody counts. A request makes one event,
// a watch two: one when it begins and one when it ends.
const auditPolicy = `apiVersion: audit.k8s.io/v1
kind: Policy
omitStages: [RequestReceived]
rules:
- level: None
  nonResourceURLs: ["/livez*", "/readyz*", "/healthz*", "/openapi*"]
- level: Metadata
`

// Stage says what has happened to a request when its event was written.
type Stage string

const (
	// StageStarted is a watch, or another long request, that has begun.
	StageStarted Stage = "ResponseStarted"
	// StageComplete is a request that was answered, or a watch that ended.
	StageComplete Stage = "ResponseComplete"
	// StagePanic is a request on which the API server failed.
	StagePanic Stage = "Panic"
)

// Event is a line of the audit log, without what tests do not look at.
type Event struct {
	ID    string // the same for both events of a watch
	Stage Stage
	// Verb is Kubernetes' own: get, list, watch, create, update, patch, delete,
	// deletecollection; for requests outside the resources, HTTP's in lower case.
	Verb string
	// User is who authenticated, Impersonated whom the request acted as, empty
	// where it acted as the user.
	User         string
	Impersonated string
	UserAgent    string
	URI          string // path and query
	// Group to Name are empty where they do not apply.
	Group       string
	Resource    string
	Subresource string
	Namespace   string
	Name        string
	Code        int       // the status code of the answer
	Received    time.Time // when the request came in
	Written     time.Time // when the stage was reached
}

// Audit reads the audit log of a cluster. It holds no state; its methods may
// be called at any time between Run and Stop.
type Audit struct {
	path string
}

// Mark is a position in the audit log.
type Mark int64

// Mark returns the end of the last finished line of the log. The events of all
// requests whose answers have been read to their end lie before it, since the
// API server writes an event before it ends the answer. A line that is being
// written, whose beginning may be in the file already, lies behind it.
func (a *Audit) Mark() Mark {
	mark, err := a.end()
	if err != nil {
		// The file is made before the API server starts: it is missing only
		// after Stop, when there is nothing to count.
		return 0
	}
	return mark
}

// end returns where the last finished line ends.
func (a *Audit) end() (Mark, error) {
	const longest = 1 << 20 // bytes; far more than any line has
	info, err := os.Stat(a.path)
	if err != nil {
		return 0, fmt.Errorf("find the end of the audit log: %w", err)
	}
	tail := Mark(max(info.Size()-longest, 0))
	text, err := a.read(tail)
	if err != nil {
		return 0, err
	}
	return tail + Mark(bytes.LastIndexByte(text, '\n')+1), nil
}

// Since returns the events after the mark in the order in which they were
// written. Requests of every client are in it, also those of the controller
// manager and of the API server to itself: select by User or UserAgent.
func (a *Audit) Since(mark Mark) ([]Event, error) {
	text, err := a.read(mark)
	if err != nil {
		return nil, err
	}
	// What follows the last line break is a line that is being written.
	text = text[:bytes.LastIndexByte(text, '\n')+1]
	var events []Event
	for line := range bytes.Lines(text) {
		event, err := parseEvent(line)
		if err != nil {
			return nil, fmt.Errorf("read the audit log: %w", err)
		}
		events = append(events, event)
	}
	return events, nil
}

// read returns the log from the mark on.
func (a *Audit) read(mark Mark) ([]byte, error) {
	f, err := os.Open(a.path)
	if err != nil {
		return nil, fmt.Errorf("open the audit log: %w", err)
	}
	defer func() { _ = f.Close() }()
	if _, err := f.Seek(int64(mark), io.SeekStart); err != nil {
		return nil, fmt.Errorf("seek in the audit log: %w", err)
	}
	text, err := io.ReadAll(f)
	if err != nil {
		return nil, fmt.Errorf("read the audit log: %w", err)
	}
	return text, nil
}

// dropPartial cuts off a line that a killed API server did not finish; the
// next one's first event would be appended to it. Its request was never
// answered.
func (a *Audit) dropPartial() error {
	end, err := a.end()
	if err != nil {
		return err
	}
	if err := os.Truncate(a.path, int64(end)); err != nil {
		return fmt.Errorf("cut the audit log: %w", err)
	}
	return nil
}

func parseEvent(line []byte) (Event, error) {
	type user struct {
		Username string `json:"username"`
	}
	var raw struct {
		AuditID          string `json:"auditID"`
		Stage            Stage  `json:"stage"`
		RequestURI       string `json:"requestURI"`
		Verb             string `json:"verb"`
		User             user   `json:"user"`
		ImpersonatedUser *user  `json:"impersonatedUser"`
		UserAgent        string `json:"userAgent"`
		ObjectRef        struct {
			APIGroup    string `json:"apiGroup"`
			Resource    string `json:"resource"`
			Subresource string `json:"subresource"`
			Namespace   string `json:"namespace"`
			Name        string `json:"name"`
		} `json:"objectRef"`
		ResponseStatus struct {
			Code int `json:"code"`
		} `json:"responseStatus"`
		RequestReceivedTimestamp time.Time `json:"requestReceivedTimestamp"`
		StageTimestamp           time.Time `json:"stageTimestamp"`
	}
	if err := json.Unmarshal(line, &raw); err != nil {
		return Event{}, fmt.Errorf("parse event: %w", err)
	}
	if raw.AuditID == "" {
		return Event{}, errors.New("parse event: it has no auditID")
	}
	event := Event{
		ID: raw.AuditID, Stage: raw.Stage, Verb: raw.Verb, User: raw.User.Username, UserAgent: raw.UserAgent,
		URI: raw.RequestURI, Group: raw.ObjectRef.APIGroup, Resource: raw.ObjectRef.Resource,
		Subresource: raw.ObjectRef.Subresource, Namespace: raw.ObjectRef.Namespace, Name: raw.ObjectRef.Name,
		Code: raw.ResponseStatus.Code, Received: raw.RequestReceivedTimestamp, Written: raw.StageTimestamp,
	}
	if raw.ImpersonatedUser != nil {
		event.Impersonated = raw.ImpersonatedUser.Username
	}
	return event, nil
}
