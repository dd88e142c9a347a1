package sync

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/util/validation/field"
)

var (
	secrets    = schema.GroupResource{Resource: "secrets"}
	secretKind = schema.GroupKind{Kind: "Secret"}
)

func terminating() error {
	err := apierrors.NewForbidden(secrets, "pull", errors.New("unable to create new content in namespace n because it is being terminated"))
	err.ErrStatus.Details.Causes = []metav1.StatusCause{{Type: corev1.NamespaceTerminatingCause, Message: "namespace n is being terminated", Field: "metadata.namespace"}}
	return err
}

func overQuota() error {
	return apierrors.NewForbidden(secrets, "pull", errors.New("exceeded quota: q, requested: secrets=1, used: secrets=1, limited: secrets=1"))
}

// invalid is an error that quotes the value, as the API server writes it.
func invalid() error {
	return apierrors.NewInvalid(secretKind, "pull", field.ErrorList{
		field.Invalid(field.NewPath("data").Key(corev1.DockerConfigJsonKey), canary, "must be JSON"),
		field.Required(field.NewPath("metadata", "name"), canary),
		field.NotSupported(field.NewPath("type"), canary, []string{"a"}),
	})
}

// policy is the refusal of a ValidatingAdmissionPolicy, as the API server writes it
// (k8s.io/apiserver, pkg/admission/plugin/policy/validating/dispatcher.go).
func policy() error {
	const message = "ValidatingAdmissionPolicy 'p' with binding 'b' denied request: only pull Secrets"
	err := apierrors.NewForbidden(secrets, "pull", errors.New(message))
	err.ErrStatus.Reason, err.ErrStatus.Code = metav1.StatusReasonInvalid, http.StatusUnprocessableEntity
	err.ErrStatus.Details.Causes = append(err.ErrStatus.Details.Causes, metav1.StatusCause{Message: message})
	return err
}

func TestClassifyError(t *testing.T) {
	t.Parallel()
	tests := map[string]struct {
		err  error
		want ErrorClass
	}{
		"the namespace is being deleted":  {terminating(), ClassGone},
		"the namespace or Secret is gone": {apierrors.NewNotFound(secrets, "pull"), ClassGone},
		"somebody else was faster":        {apierrors.NewConflict(secrets, "pull", errors.New("x")), ClassConflict},
		"an apply meets another manager":  {apierrors.NewApplyConflict([]metav1.StatusCause{{Field: ".data"}}, "x"), ClassConflict},
		"it is there already":             {apierrors.NewAlreadyExists(secrets, "pull"), ClassConflict},
		"not allowed":                     {apierrors.NewForbidden(secrets, "pull", errors.New("no")), ClassWait},
		"over quota":                      {overQuota(), ClassWait},
		"invalid":                         {invalid(), ClassTerminal},
		"a bad request":                   {apierrors.NewBadRequest("x"), ClassTerminal},
		"too large":                       {apierrors.NewRequestEntityTooLargeError("x"), ClassTerminal},
		"a method that is not there":      {apierrors.NewMethodNotSupported(secrets, "patch"), ClassTerminal},
		"a type that the server cannot read": {
			&apierrors.StatusError{ErrStatus: metav1.Status{Reason: metav1.StatusReasonUnsupportedMediaType, Code: http.StatusUnsupportedMediaType}}, ClassTerminal,
		},
		"too many requests":                {apierrors.NewTooManyRequests("x", 1), ClassRetry},
		"a timeout of the server":          {apierrors.NewServerTimeout(secrets, "patch", 1), ClassRetry},
		"a timeout":                        {apierrors.NewTimeoutError("x", 1), ClassRetry},
		"unavailable":                      {apierrors.NewServiceUnavailable("x"), ClassRetry},
		"an internal error":                {apierrors.NewInternalError(errors.New("x")), ClassRetry},
		"a credential that has expired":    {apierrors.NewUnauthorized("x"), ClassRetry},
		"a webhook that does not answer":   {apierrors.NewInternalError(errors.New("failed calling webhook")), ClassRetry},
		"an expired list":                  {apierrors.NewResourceExpired("x"), ClassRetry},
		"the context has ended":            {context.DeadlineExceeded, ClassRetry},
		"no answer":                        {errors.New("connection refused"), ClassRetry},
		"no error":                         {nil, ClassRetry},
		"not found, of a deleted resource": {apierrors.NewNotFound(schema.GroupResource{Group: "images.banzaicloud.io", Resource: "imagepullsecrets"}, "a"), ClassGone},
	}
	for name, test := range tests {
		require.Equal(t, test.want, ClassifyError(test.err), name)
		if test.err != nil {
			require.Equal(t, test.want, ClassifyError(fmt.Errorf("write: %w", fmt.Errorf("x: %w", test.err))), name+", wrapped")
			require.Equal(t, test.want, ClassifyError(errors.Join(nil, test.err)), name+", joined")
		}
	}
}

// One refused Secret must not make another wait that only needs another try.
func TestOfJoinedErrorsTheOneThatComesBackSoonestCounts(t *testing.T) {
	t.Parallel()
	gone, conflict := apierrors.NewNotFound(secrets, "a"), apierrors.NewConflict(secrets, "b", errors.New("x"))
	passing := apierrors.NewInternalError(errors.New("x"))
	for name, test := range map[string]struct {
		errs []error
		want ErrorClass
	}{
		"refused, then passing":      {[]error{overQuota(), passing}, ClassRetry},
		"passing, then refused":      {[]error{passing, overQuota()}, ClassRetry},
		"invalid, then passing":      {[]error{invalid(), passing}, ClassRetry},
		"gone, then passing":         {[]error{gone, passing}, ClassRetry},
		"gone, then no answer":       {[]error{gone, errors.New("connection refused")}, ClassRetry},
		"gone, then refused":         {[]error{gone, overQuota()}, ClassWait},
		"refused, then gone":         {[]error{overQuota(), gone}, ClassWait},
		"invalid, then refused":      {[]error{invalid(), overQuota()}, ClassWait},
		"refused, then conflict":     {[]error{overQuota(), conflict}, ClassConflict},
		"gone, then conflict":        {[]error{gone, conflict}, ClassConflict},
		"gone, and gone":             {[]error{gone, nil, gone}, ClassGone},
		"invalid twice":              {[]error{invalid(), invalid()}, ClassTerminal},
		"passing beside a joined":    {[]error{errors.Join(gone, overQuota()), passing}, ClassRetry},
		"a joined that is all there": {[]error{errors.Join(gone, overQuota())}, ClassWait},
	} {
		require.Equal(t, test.want, ClassifyError(errors.Join(test.errs...)), name)
		require.Equal(t, test.want, ClassifyError(fmt.Errorf("x: %w", errors.Join(test.errs...))), name)
	}
}

func TestErrorClassesHaveNames(t *testing.T) {
	t.Parallel()
	seen := map[string]bool{}
	for _, class := range []ErrorClass{ClassRetry, ClassConflict, ClassGone, ClassWait, ClassTerminal} {
		name := class.String()
		require.Regexp(t, "^[a-z]+$", name)
		require.False(t, seen[name], name)
		seen[name] = true
	}
}

func TestExplain(t *testing.T) {
	t.Parallel()
	tests := map[string]struct {
		err  error
		want string
	}{
		"no error":              {nil, ""},
		"an error of our own":   {errors.New("namespace \"x\" is not allowed"), "namespace \"x\" is not allowed"},
		"not found":             {apierrors.NewNotFound(secrets, "pull"), `secrets "pull" not found`},
		"a wrapped one":         {fmt.Errorf("write: %w", apierrors.NewNotFound(secrets, "pull")), `secrets "pull" not found`},
		"not allowed":           {apierrors.NewForbidden(secrets, "pull", errors.New("User \"x\" cannot patch")), `secrets "pull" is forbidden: User "x" cannot patch`},
		"over quota":            {overQuota(), "the namespace's quota is exceeded"},
		"being terminated":      {terminating(), `secrets "pull" is forbidden: unable to create new content in namespace n because it is being terminated`},
		"too many requests":     {apierrors.NewTooManyRequests("slow down", 1), "slow down"},
		"an answer without any": {&apierrors.StatusError{ErrStatus: metav1.Status{Reason: metav1.StatusReasonInvalid}}, "the API server finds it invalid"},
		"refused by a policy": {
			policy(), "ValidatingAdmissionPolicy 'p' with binding 'b' denied request: only pull Secrets",
		},
		"refused by a webhook": {
			&apierrors.StatusError{ErrStatus: metav1.Status{Code: http.StatusBadRequest, Message: `admission webhook "w" denied the request: no`}},
			`admission webhook "w" denied the request: no`,
		},
		"a test of a JSON patch that fails": {
			apierrors.NewGenericServerResponse(http.StatusUnprocessableEntity, "", schema.GroupResource{}, "", canary, 0, true),
			"the API server finds it invalid: UnexpectedServerResponse",
		},
		"a request that the server cannot read": {apierrors.NewBadRequest("x"), "the API server cannot read the request"},
		"invalid": {
			invalid(),
			"the API server finds it invalid: FieldValueInvalid of data[.dockerconfigjson], FieldValueRequired of metadata.name, FieldValueNotSupported of type",
		},
	}
	for name, test := range tests {
		require.Equal(t, test.want, Explain(test.err), name)
	}
}

func TestExplainNeverQuotesValues(t *testing.T) {
	t.Parallel()
	apply := apierrors.NewApplyConflict([]metav1.StatusCause{
		{Type: metav1.CauseTypeFieldManagerConflict, Field: ".data..dockerconfigjson", Message: `conflict with "kubectl" using v1`},
	}, `Apply failed with 1 conflict: conflict with "kubectl" using v1: .data..dockerconfigjson`)
	for _, err := range []error{
		invalid(), fmt.Errorf("write: %w", invalid()), errors.Join(errors.New("x"), invalid()), apply,
		// A server that decodes JSON with an older library quotes what is around the place.
		apierrors.NewBadRequest(`Secret in version "v1" cannot be handled as a Secret: error found in #10 byte of ...|` + canary + `|...`),
	} {
		explained := Explain(err)
		requireSilent(t, explained)
		require.NotEmpty(t, explained)
		require.NotContains(t, explained, "\n")
	}
	// The sample would show it.
	require.True(t, strings.Contains(invalid().Error(), canary))
}

func TestSecretWritesAreCountedByResult(t *testing.T) {
	t.Parallel()
	registry := prometheus.NewRegistry()
	m := NewMetrics(registry)
	m.SecretWrite("cluster", "update", nil)
	m.SecretWrite("cluster", "update", nil)
	m.SecretWrite("cluster", "update", overQuota())
	m.SecretWrite("node", "create", fmt.Errorf("x: %w", invalid()))
	families, err := registry.Gather()
	require.NoError(t, err)
	require.Len(t, families, 1)
	require.Equal(t, "imps_secret_writes_total", families[0].GetName())
	counts := map[string]float64{}
	for _, metric := range families[0].GetMetric() {
		var labels []string
		for _, label := range metric.GetLabel() {
			labels = append(labels, label.GetName()+"="+label.GetValue())
		}
		counts[strings.Join(labels, ",")] = metric.GetCounter().GetValue()
	}
	require.Equal(t, map[string]float64{
		"duty=cluster,result=ok,verb=update":      2,
		"duty=cluster,result=refused,verb=update": 1,
		"duty=node,result=invalid,verb=create":    1,
	}, counts)
}
